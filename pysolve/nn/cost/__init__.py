"""Parameters, multiply-accumulates, bytes and times of networks, and of networks that are cut."""
