"""DVC as processes: what is stale, one stage, all, repairs after a kill, the shared remote, old data."""
