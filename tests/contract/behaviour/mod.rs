//! The behaviours, one function each. Each one cleans up after itself.

mod clone;
mod destroy;
mod exec;
mod forward;
mod lifecycle;
mod listen;
mod pause;
mod quorum;

use std::{future::Future, pin::Pin};

use agent::pve::{Error, ErrorKind};

use crate::stage::{Shown, Stage};

type Showing<'a> = Pin<Box<dyn Future<Output = Shown> + 'a>>;

/// Name and function of a behaviour.
pub(crate) type Behaviour = (&'static str, for<'a> fn(&'a dyn Stage) -> Showing<'a>);

macro_rules! behaviours {
    ($($module:ident :: $name:ident,)*) => {
        pub(crate) const ALL: &[Behaviour] = &[$(
            (concat!(stringify!($module), "::", stringify!($name)), |stage| Box::pin($module::$name(stage))),
        )*];
    };
}

behaviours! {
    clone::cloned_container_has_its_mark_and_its_volume,
    clone::mark_is_written_before_the_volume,
    clone::second_clone_of_a_busy_template_is_refused,
    clone::clone_to_a_taken_vmid_is_refused,
    clone::clone_of_a_missing_or_ordinary_container_is_refused,
    clone::clone_continues_without_its_caller,
    lifecycle::configure_sets_our_values_and_keeps_others,
    lifecycle::configure_keeps_the_interface_settings,
    lifecycle::resize_grows_a_disk_and_never_shrinks_it,
    lifecycle::limits_of_a_container_change_at_once,
    lifecycle::container_is_handed_only_to_a_node_that_sees_its_disk,
    lifecycle::start_and_stop_are_idempotent,
    lifecycle::container_shuts_down_when_it_is_asked,
    lifecycle::foreign_container_is_left_alone,
    lifecycle::missing_container_is_not_found,
    lifecycle::start_stop_and_configure_respect_a_foreign_lock,
    lifecycle::storage_room_is_reported,
    destroy::destroy_is_idempotent,
    destroy::running_container_is_stopped_before_it_is_destroyed,
    destroy::destroy_of_a_container_of_another_owner_is_refused,
    destroy::destroy_of_a_protected_or_locked_container_is_refused,
    destroy::a_killed_clone_is_cleaned_up,
    destroy::a_clone_killed_at_once_is_cleaned_up,
    destroy::a_clone_killed_while_mounted_is_cleaned_up,
    destroy::a_killed_destruction_is_finished,
    destroy::destroy_waits_for_the_clone_of_an_earlier_agent,
    destroy::template_is_not_unlocked_while_its_clone_runs,
    destroy::clone_terminated_at_its_deadline_is_cleaned_up,
    destroy::destroy_spares_a_foreign_volume,
    destroy::volume_of_a_killed_clone_is_removed_only_if_it_is_owned,
    pause::frozen_container_keeps_its_processes_and_continues,
    pause::snapshot_is_refused_while_the_lock_is_held,
    pause::pause_leaves_a_container_of_another_owner_alone,
    pause::paused_container_can_be_stopped_started_and_destroyed,
    pause::container_is_frozen_and_thawed_without_quorum,
    exec::short_commands_do_not_end_a_long_one,
    forward::bytes_pass_between_two_ends_inside,
    listen::server_on_loopback_alone_is_told_apart,
    quorum::changes_are_refused_without_quorum,
    quorum::reads_and_changes_are_refused_without_pmxcfs,
}

/// Returns the kind of the error, which must be there.
fn refused(result: Result<(), Error>) -> ErrorKind {
    result.expect_err("it must be refused").kind
}

macro_rules! assert_kind {
    ($result:expr, $kind:ident) => {
        let kind = $crate::behaviour::refused($result);
        assert!(matches!(kind, agent::pve::ErrorKind::$kind(_)), "{kind:?}");
    };
}
use assert_kind;
