"""The host model looked at: its experts modules however stored, and what adapters may touch."""
