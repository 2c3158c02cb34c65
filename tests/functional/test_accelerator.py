"""What accelerators compute, computed on a CPU: the tests of the streamed forms once more."""

import jax.numpy as jnp
import pytest

from tests.functional import test_streaming
from tests.functional.test_streaming import (  # noqa: F401
    test_a_half_precision_gradient_has_the_dtype_of_the_logits,
    test_a_row_of_the_least_numbers,
    test_a_temperature_for_each_position_and_a_sweep,
    test_an_excluded_position_may_hold_anything,
    test_classes_sharded_over_devices,
    test_cross_entropy_from_logits,
    test_cross_entropy_of_classes_sharded_over_devices,
    test_edges_are_those_of_the_log_probability_functions,
    test_exported_for_any_number_of_positions,
    test_hessians,
    test_mapped_twice_along_any_axis,
    test_slopes_of_extreme_mixtures,
    test_value_and_gradients,
)
from tests.functional.test_top_k import (  # noqa: F401
    test_agreement,
    test_edges,
    test_every_derivative_by_differences,
    test_masked_classes,
    test_padding,
    test_rows_and_classes_sharded_over_devices,
    test_the_whole_vocabulary,
)
from tests.programs import as_for_an_accelerator

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def accelerator():
    with as_for_an_accelerator():
        yield


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_accuracy_by_the_true_divergence(dtype):
    """Of 1,000 classes: more a CPU adds up one after the other, as no accelerator does."""
    test_streaming.test_accuracy_by_the_true_divergence(1_000, 8, dtype)
