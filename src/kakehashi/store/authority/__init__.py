"""Who may reach the store, for how long, and the proof of it afterwards.

The authority hands out tickets, grants and leases; sshd asks it (through the book) at each
authentication; the guard closes what has no live lease; a receipt says what was seen.
"""
