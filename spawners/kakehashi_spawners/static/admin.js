// JupyterHub's administration table reads these globals; the policy of the pages allows no
// inline script, so they are set from attributes here, before the table's own script runs.
"use strict";
{
  const { baseUrl, user, xsrf } = document.body.dataset;
  const { pageLimit } = document.getElementById("react-admin-hook").dataset;
  window.api_page_limit = Number.parseInt(pageLimit, 10);
  window.base_url = baseUrl;
  window.jhdata = { base_url: baseUrl, user, xsrf_token: xsrf, admin_access: true };
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const follow = () => {
    document.documentElement.dataset.bsTheme = dark.matches ? "dark" : "light";
  };
  dark.addEventListener("change", follow);
  follow();
}
