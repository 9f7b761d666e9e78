"""Programs that measure: they print tables and write JSON and PNG under build/."""
