#!/bin/sh
# Makes the people's local accounts, with the same ids on every host of a site.
# usage: people.sh FILE, one line "NAME UID" each
set -eu
while read -r name uid; do
  case $name in "" | "#"*) continue ;; esac
  useradd --create-home --uid "$uid" --user-group --shell /bin/bash "$name"
  chmod 0700 "/home/$name"
done <"$1"
