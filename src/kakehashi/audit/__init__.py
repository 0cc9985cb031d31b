"""The hash-chained audit trail at the store."""
