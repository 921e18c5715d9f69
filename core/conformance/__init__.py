"""How an adapter is put through the checks of its contract, and what comes of it. The checks are the rooms' own."""
