"""What is: the fleet file, fleets and their releases.

For `rollout` and `cli`. It knows calve.toml and the records in the bucket (release v1), and nothing of how a
release gets onto machines. Types: `Config`, `Fleet`, `Release`.
"""
