"""A nightly job: one day's partition is labelled, verified, tagged and mixed; on any scheduler."""
