# The store: sshd, authority, guard. Build from the root of the repository.
FROM debian:12.12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates gcc libc6-dev openssh-server openssh-sftp-server python3 python3-venv \
 && rm -rf /var/lib/apt/lists/* /etc/ssh/ssh_host_*
WORKDIR /opt/kakehashi
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY spawners spawners
COPY extensions extensions
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir -e '.[store]' \
 && .venv/bin/python -m kakehashi.store.facets.build_library libexec
ENV KAKEHASHI_CONFIG=/etc/kakehashi.toml \
    PATH=/opt/kakehashi/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
VOLUME ["/srv/kakehashi"]
EXPOSE 22 8470 8471 11112
# Root is needed: sshd changes root folder and account for each connection, and the supervisor
# closes connections. The authority and the guard run as the account kakehashi.
USER root
# Accounts live in the container, so they are made at each start; keys and data are in the volume.
CMD ["/bin/sh", "-c", "kakehashi store init && exec kakehashi store serve"]
