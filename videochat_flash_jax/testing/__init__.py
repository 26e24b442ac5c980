"""Small stand-ins, public so that users' tests can be fast, too: `testing.dummy`."""
