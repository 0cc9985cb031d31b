"""Whether a caller is one of the senders, and of which hospital."""

from __future__ import annotations

import ipaddress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kakehashi.store.receive.settings import Receive


class Senders:
    """The allow-list, ready to be asked.

    Parameters
    ----------
    settings : Receive
    """

    def __init__(self, settings: Receive) -> None:
        self._known = [
            (sender, tuple(ipaddress.ip_network(text) for text in sender.addresses))
            for sender in settings.senders
        ]

    def facilities(self, address: str) -> frozenset[str]:
        """Return whose devices may call from an address; most have one, strangers none."""
        caller = _plain(address)
        return frozenset(
            sender.facility
            for sender, networks in self._known
            if any(caller in network for network in networks)
        )

    def facility(self, address: str, calling: str) -> str | None:
        """Return whose device calls, None if that device may not call from there."""
        caller = _plain(address)
        for sender, networks in self._known:
            if calling in sender.ae_titles and any(caller in network for network in networks):
                return sender.facility
        return None


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return an address; an IPv4 one that came through an IPv6 socket as what it is."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return mapped or parsed
