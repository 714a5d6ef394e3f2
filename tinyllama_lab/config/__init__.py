"""Settings: their types and bounds, which a sweep varies, and how they are typed."""
