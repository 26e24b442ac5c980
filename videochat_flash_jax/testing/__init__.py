"""Small models and videos for fast tests, also for tests of users: see `testing.dummy`."""
