"""The real state machine against a seeded virtual cluster on a virtual clock."""
