"""Which tests take long: they are marked ``slow``, and ``make check`` leaves them out.

Measured, not guessed: what took more than a second or so on two cores. That all of them exist is
tested in tests/house.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings
from small_process import asked

from ckdiff.kernels import compiled, kinds

gc.disable()  # until the tests are collected

# how long an example takes says more of the machine than of the code: kernels are compiled in some
settings.register_profile("ckdiff", deadline=None)
settings.load_profile("ckdiff")


@pytest.fixture(autouse=True, scope="session")
def the_disk_is_not_waited_for() -> Iterator[None]:
    """No test can see whether bytes got to the disk, and waiting for it was a sixth of the time.
    That it is asked, when and what for, is tested by those that put something in place of this or
    start processes, which do wait.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", asked)
        yield


@pytest.fixture(autouse=True, scope="session")
def kernels_asked_for_are_listed() -> Iterator[None]:
    """Packages hold the machine code of the kernels that are listed. Whoever asks for another waits
    for a compiler, or has none: no test may. Kinds named portable are what tests compare with.
    """
    find, listed = compiled._find, frozenset(kinds.every())

    def checked(name: str, kind: str) -> compiled.Function:
        known = (name, kind) in listed or kind.endswith("portable")
        assert known, f"ckdiff/kernels/kinds.py does not list {name!r} {kind!r}"
        return find(name, kind)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_find", checked)
        yield


SLOW: dict[str, str] = {
    "test_faults_readers": """
        test_damaged_chunk_under_an_open_store
    """,
    "test_delta_indices": """
        test_tensors_of_many_windows_in_bounded_memory
    """,
    "test_bench": """
        test_delta_benchmark_rebuilds_and_stays_above_the_floor
        test_benchmarks_run
    """,
    "test_cli_overlap": """
        test_a_scheduler_that_does_not_answer
    """,
    "test_cluster": """
        test_a_cluster_says_and_writes_what_a_run_here_does
        test_a_scheduler_that_dies_or_hangs
        test_a_task_that_kills_every_worker_ends
        test_an_active_client_is_used
        test_another_version_and_no_ckdiff_at_all
        test_errors_of_tasks_arrive_as_they_are
        test_what_workers_do_not_see
        test_without_any_worker_it_ends
    """,
    "test_convert": """
        test_the_result_is_read_by_everybody
    """,
    "test_delta": """
        test_any_flipped_byte_is_noticed
        test_memory_is_bounded
        test_tensors_of_several_windows
    """,
    "test_delta_frames": """
        test_windows_as_large_as_they_get
    """,
    "test_delta_fuzz": """
        test_sealed_mutations
    """,
    "test_delta_inplace": """
        test_any_change_is_what_is_made_elsewhere
        test_killed_and_run_again
        test_killed_and_undone
        test_memory_is_bounded
    """,
    "test_delta_strangers": """
        test_what_is_declared_takes_no_memory
    """,
    "test_engine": """
        test_2_to_the_33_elements_in_one_tensor
        test_statistics_of_a_diff
        test_counts_and_masks_across_chunks
        test_100_000_tensors
        test_a_diff_is_what_the_twin_says
    """,
    "test_faults_store": """
        test_fsync_fails
        test_killed_at_every_call
        test_overwriting_is_killed_at_every_call
        test_overwriting_that_would_take_two_steps_is_refused_before_the_work
    """,
    "test_gpu_changes": """
        test_against_the_kernels_of_the_cpu
    """,
    "test_gpu_tensors": """
        test_nothing_is_copied_and_the_store_is_the_same
    """,
    "test_graft": """
        test_every_bit
        test_memory_is_bounded
    """,
    "test_header": """
        test_a_hundred_thousand_tensors
    """,
    "test_import": """
        test_more_than_a_chunk
    """,
    "test_inplace_killed": """
        test_killed_and_run_again
        test_killed_while_it_is_repaired
    """,
    "test_import_memory": """
        test_memory_is_bounded_by_what_is_there
    """,
    "test_import_proved": """
        test_more_members_than_a_zip_counts
    """,
    "test_kernel_image": """
        test_a_kernel_found_on_disk_is_loaded_without_numba
        test_every_kernel_is_kept_as_an_image
        test_where_no_image_can_be_had_numba_keeps_and_loads_the_code
    """,
    "test_kernel_process": """
        test_cache_files_are_shared_verified_and_replaced
        test_no_place_for_the_cache
    """,
    "test_kernels": """
        test_every_16_bit_element_with_many_others
        test_any_tolerance_on_floats
        test_any_tolerance_on_integers
    """,
    "test_kinds": """
        test_killed_and_resumed_by_the_same_options_only
        test_strided_shared_and_empty_tensors
    """,
    "test_mask_kernels": """
        test_pairs_and_votes
    """,
    "test_memory": """
        test_control_group_of_384_megabytes
        test_memory_option_is_kept
        test_peak_does_not_depend_on_the_size
    """,
    "test_memory_layouts": """
        test_memory_is_bounded
    """,
    "test_notebooks": """
        test_it_runs
    """,
    "test_nulls": """
        test_a_coarser_null_takes_structure_for_agreement
        test_z_is_standard_normal_under_its_own_null
    """,
    "test_paper_model": """
        test_a_run_is_the_same_each_time
        test_it_is_llama
        test_offline_algorithms_make_the_right_answers_likelier
    """,
    "test_paper_published": """
        test_a_pair_is_streamed_and_held_against_the_table
    """,
    "test_paper_walk": """
        test_it_runs
    """,
    "test_progress": """
        test_compiling_is_really_said
    """,
    "test_random": """
        test_workers_do_not_matter
    """,
    "test_real_checkpoints": """
        test_half_precision_under_every_rule
    """,
    "test_rebuilt": """
        test_killed_at_every_call
    """,
    "test_rowcol": """
        test_products_of_margins_would_not_do
        test_z_of_independent_masks_is_a_standard_normal
    """,
    "test_setops": """
        test_against_numpy
    """,
    "test_shipped": """
        test_damage_is_noticed_and_the_kernel_is_compiled
        test_every_level_counts_alike_and_compiles_nothing
    """,
    "test_sharded_runs": """
        test_whatever_two_processes_write
    """,
    "test_startup_signals": """
        test_at_any_time
    """,
    "test_store_format": """
        test_masks_can_be_read_with_zarr_and_json_alone
    """,
    "test_store_fuzz": """
        test_changed_stores_are_refused_or_read_alike
        test_the_honest_stores_are_read_by_all
    """,
    "test_surroundings": """
        test_a_user_s_numba_stays_the_user_s
        test_json_is_alone_on_stdout_whatever_lies_here
        test_numba_s_file_in_the_current_directory
        test_variables_for_numba_are_not_for_us
        test_what_another_s_numba_compiles_is_kept_if_it_is_the_same
    """,
    "test_sync_docs": """
        test_the_page
    """,
    "test_sync_memory": """
        test_memory_is_the_snapshot_and_a_bounded_rest
    """,
    "test_sync_sharded": """
        test_two_processes_publish_together
    """,
    "test_timeline_hostile": """
        test_many_checkpoints_take_smaller_windows
    """,
    "test_timeline_memory": """
        test_a_stream_keeps_to_its_memory
    """,
    "test_timeline_resuming": """
        test_killed_and_resumed
        test_several_chunks
        test_what_is_left_is_cleaned
    """,
    "test_timeline_statistics": """
        test_any_window_and_workers_give_the_same_bytes
        test_twin
    """,
    "test_timeline_versions": """
        test_full_versions_are_checkpoints
        test_tensors_that_no_chunk_holds_whole
    """,
    "test_training_compact": """
        test_sharded_by_fsdp2
    """,
    "test_training_docs": """
        test_trainers
    """,
    "test_training_imports": """
        test_what_is_not_installed_is_said
    """,
    "test_training_optax": """
        test_inside_other_transformations
        test_masked_weights_train_as_without_a_mask
        test_without_torch_on_two_devices
    """,
    "test_training_sharded": """
        test_masks_are_cut_as_torch_cuts_weights
        test_two_processes_give_what_one_does
    """,
    "test_training_trl": """
        test_nothing_is_left_behind
        test_resuming_and_training_again
        test_the_compact_optimizer_in_a_trainer
        test_the_compact_optimizer_resumes
        test_trl
        test_two_processes
        test_what_does_not_fit_is_said_before_training
    """,
    "test_training_wrappers": """
        test_frozen_bits_stay_in_wrapped_models
    """,
    "test_trial": """
        test_every_command
    """,
    "test_unfusing": """
        test_a_hundred_thousand_tensors
    """,
    "test_metadata": """
        test_the_container_has_what_it_needs
    """,
    "test_publisher_device": """
        test_a_stream_is_the_same_to_the_byte
    """,
    "test_unfusing_models": """
        test_every_family_pairs_whole
        test_what_is_rotated_is_left
    """,
    "test_version_memory": """
        test_memory_of_commands_is_bounded
    """,
}


#: of which every test is slow: they start clusters, torch or many processes
SLOW_FILES = (
    "test_cluster test_faults_store test_hub_interrupts test_gpu test_gpu_fused test_gpu_pool "
    "test_paper_end_to_end test_paper_trl test_published"
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a second or so; not in make check")


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: looking through them for garbage again and again was a
    quarter of the time of tests that collect it, as trainers do, and a third of collecting tests.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = {(file, name) for file, names in SLOW.items() for name in names.split()}
    for item in items:
        whole = item.path.parent.name == "training" or item.path.stem in SLOW_FILES.split()
        if whole or (item.path.stem, getattr(item, "originalname", item.name)) in slow:
            item.add_marker(pytest.mark.slow)
