"""Pure arithmetic on records: what a plan costs in memory, time and disk."""
