"""The two stages and inspection: one readable spine each."""
