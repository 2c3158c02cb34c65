"""What is too much for every commit is tried in `make test-reliability` only."""

from tests.reliability.attacks import HARD


def pytest_collection_modifyitems(config, items):
    """Leaves the properties of what compiles slowly to where they are tried hard."""
    left_out = {item for item in items if not HARD and _is_slow_property(item)}
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=list(left_out))


def _is_slow_property(item):
    return item.path.name == "test_properties.py" and item.get_closest_marker("slow")
