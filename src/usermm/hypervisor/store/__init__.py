"""The store: a small tree of values that domains share, with permissions, transactions and watches, as xenstore has."""
