"""The contracts between rooms: devices, engines, features, masks and algorithms. No implementation lives here."""
