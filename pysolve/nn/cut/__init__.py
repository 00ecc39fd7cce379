"""A plan carried out: narrower layers, new values, other forms, and one check."""
