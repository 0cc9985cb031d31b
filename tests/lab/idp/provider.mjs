// The identity provider of lab and demo: oidc-provider with a log-in page of its own.
//
// usage: node provider.mjs SETTINGS.json
// SETTINGS: {issuer, listen: {host, port}, tls: {key, cert} | null, client: {id, secretFile,
//            redirectUris, postLogoutUris}, accounts: FILE}
// The accounts file is read anew at each log-in and each userinfo call, so that a person can be
// blocked or moved while everything runs:
// {NAME: {password, name, email, groups: [...], blocked: bool, mfa: bool}}
import { readFileSync } from 'node:fs';
import http from 'node:http';
import https from 'node:https';
import { timingSafeEqual, createHash, randomBytes } from 'node:crypto';
import { Provider } from 'oidc-provider';

const settings = JSON.parse(readFileSync(process.argv[2], 'utf8'));
const accounts = () => JSON.parse(readFileSync(settings.accounts, 'utf8'));
const digest = (text) => createHash('sha256').update(String(text)).digest();

const findAccount = async (ctx, sub) => {
  const account = accounts()[sub];
  if (!account || account.blocked) return undefined;
  return {
    accountId: sub,
    async claims() {
      return {
        sub,
        preferred_username: sub,
        name: account.name,
        email: account.email,
        groups: account.groups,
        amr: account.mfa ? ['pwd', 'mfa'] : ['pwd'],
      };
    },
  };
};

const provider = new Provider(settings.issuer, {
  clients: [{
    client_id: settings.client.id,
    client_secret: readFileSync(settings.client.secretFile, 'utf8').trim(),
    redirect_uris: settings.client.redirectUris,
    post_logout_redirect_uris: settings.client.postLogoutUris,
    grant_types: ['authorization_code', 'refresh_token'],
    response_types: ['code'],
    token_endpoint_auth_method: 'client_secret_basic',
  }],
  claims: {
    openid: ['sub', 'amr'], profile: ['name', 'preferred_username'], email: ['email'],
    groups: ['groups'],
  },
  scopes: ['openid', 'offline_access', 'profile', 'email', 'groups'],
  conformIdTokenClaims: false,
  pkce: { required: () => true },
  features: {
    devInteractions: { enabled: false },
    // Pages of our own: the provider's default ones ask the internet for a font.
    rpInitiatedLogout: {
      enabled: true,
      logoutSource: (ctx, form) => {
        ctx.body = shell(`<h1>Log out · ログアウト</h1>${form}
<button form="op.logoutForm" name="logout" value="yes" autofocus>Log out · ログアウト</button>`);
      },
      postLogoutSuccessSource: (ctx) => {
        ctx.body = shell('<h1>Logged out · ログアウトしました</h1>');
      },
    },
    revocation: { enabled: true },
  },
  interactions: { url: (ctx, interaction) => `/interaction/${interaction.uid}` },
  cookies: { keys: [randomBytes(32).toString('hex')] },
  ttl: {
    AccessToken: 3600, AuthorizationCode: 60, IdToken: 3600, RefreshToken: 86400,
    Session: 86400, Grant: 86400, Interaction: 3600,
  },
  issueRefreshToken: async () => true,
  findAccount,
});

const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const shell = (content) => `<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Platform account (demonstration)</title>
<style>
:root{color-scheme:light dark;font:16px/1.5 system-ui,"Noto Sans CJK JP",sans-serif}
body{min-height:100vh;margin:0;display:grid;place-items:center;background:light-dark(#eef2f6,#10161d)}
main{width:min(22rem,90vw);padding:2rem;border-radius:.75rem;background:light-dark(#fff,#1b242e);
box-shadow:0 .5rem 2rem #0003}
h1{font-size:1.25rem;margin:0 0 .25rem}p{margin:.25rem 0 1rem;opacity:.8}
label{display:block;margin-top:.75rem}
input{width:100%;box-sizing:border-box;font:inherit;padding:.5rem;margin-top:.25rem;
border:1px solid #8899aa;border-radius:.375rem}
button{margin-top:1.25rem;width:100%;font:inherit;padding:.6rem;border:0;border-radius:.375rem;
background:#0b5c86;color:#fff;cursor:pointer}
[role=alert]{color:light-dark(#a3111d,#ff9c9c)}
</style>
<main>${content}</main></html>`;

const page = (uid, message) => shell(`<h1>Medical image platform</h1>
<p>画像基盤アカウント · demonstration provider</p>
${message ? `<p role="alert">${escape(message)}</p>` : ''}
<form method="post" action="/interaction/${escape(uid)}">
<label>Account · アカウント<input name="login" autocomplete="username" required autofocus></label>
<label>Password · パスワード<input name="password" type="password"
autocomplete="current-password" required></label>
<button>Log in · ログイン</button></form>`);

const body = (request) => new Promise((resolve, reject) => {
  let text = '';
  request.on('data', (part) => {
    text += part;
    if (text.length > 4096) reject(new Error('form too large'));
  });
  request.on('end', () => resolve(new URLSearchParams(text)));
  request.on('error', reject);
});

const answer = (response, status, html) => {
  response.writeHead(status, {
    'Content-Type': 'text/html; charset=utf-8', 'Cache-Control': 'no-store',
    'Content-Security-Policy': "default-src 'none'; style-src 'unsafe-inline'",
  });
  response.end(html);
};

// The portal is the platform's own client: nobody is asked, but the provider wants it said.
const consent = async (request, response, { params, session, grantId }) => {
  const grant = grantId
    ? await provider.Grant.find(grantId)
    : new provider.Grant({ clientId: params.client_id, accountId: session.accountId });
  grant.addOIDCScope('openid offline_access profile email groups');
  return provider.interactionFinished(
    request, response, { consent: { grantId: await grant.save() } },
    { mergeWithLastSubmission: true },
  );
};

const interaction = async (request, response) => {
  const details = await provider.interactionDetails(request, response);
  if (details.prompt.name === 'consent') return consent(request, response, details);
  if (request.method !== 'POST') return answer(response, 200, page(details.uid, ''));
  const form = await body(request);
  const name = form.get('login') ?? '';
  const all = accounts();
  const account = Object.hasOwn(all, name) ? all[name] : undefined;
  const right = timingSafeEqual(
    digest(form.get('password') ?? ''), digest(account ? account.password : randomBytes(16)),
  );
  if (!account || account.blocked || !right) {
    return answer(response, 403, page(details.uid, 'Wrong account or password'));
  }
  return provider.interactionFinished(
    request, response, { login: { accountId: name, amr: account.mfa ? ['pwd', 'mfa'] : ['pwd'] } },
    { mergeWithLastSubmission: false },
  );
};

const callback = provider.callback();
const handler = (request, response) => {
  if (!request.url.startsWith('/interaction/')) return callback(request, response);
  return interaction(request, response).catch((error) => {
    console.error(error);
    answer(response, 400, page('', 'This log-in has expired; go back to the portal'));
  });
};

const server = settings.tls
  ? https.createServer({
    key: readFileSync(settings.tls.key), cert: readFileSync(settings.tls.cert),
  }, handler)
  : http.createServer(handler);
server.listen(settings.listen.port, settings.listen.host, () => console.log('ready'));
