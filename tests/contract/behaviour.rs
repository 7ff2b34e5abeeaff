//! The behaviours, one function each. Each one cleans up after itself.

mod clone;
mod destroy;
mod exec;
mod lifecycle;
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
    clone::it_has_its_mark_and_its_volume,
    clone::its_mark_is_there_from_the_first_write,
    clone::a_second_one_of_the_template_is_refused,
    clone::a_taken_number_is_refused,
    clone::a_template_that_is_none_is_refused,
    clone::it_goes_on_without_its_caller,
    lifecycle::configure_sets_and_keeps,
    lifecycle::configure_keeps_what_the_interface_says,
    lifecycle::a_disk_is_made_larger_and_never_smaller,
    lifecycle::it_goes_to_a_node_that_sees_its_disk,
    lifecycle::start_and_stop_are_idempotent,
    lifecycle::what_is_not_ours_is_left_alone,
    lifecycle::what_is_missing_is_not_found,
    lifecycle::a_foreign_lock_is_respected,
    lifecycle::there_is_room,
    destroy::it_is_idempotent,
    destroy::what_runs_is_stopped_first,
    destroy::what_is_not_the_owners_is_refused,
    destroy::what_is_protected_or_locked_is_refused,
    destroy::a_killed_clone_is_cleaned_up,
    destroy::a_clone_killed_at_once_is_cleaned_up,
    destroy::a_clone_killed_while_mounted_is_cleaned_up,
    destroy::a_killed_destruction_is_finished,
    destroy::it_waits_for_the_clone_of_an_earlier_life,
    destroy::a_template_is_unlocked_only_from_the_dead,
    destroy::a_clone_that_was_told_to_stop_leaves_nothing,
    destroy::what_the_sandbox_did_not_make_stays,
    destroy::a_killed_clones_volume_goes_only_where_it_is_known,
    pause::what_is_frozen_keeps_its_processes_and_goes_on,
    pause::no_snapshot_is_made_while_it_is_held,
    pause::what_is_not_the_owners_is_left_alone,
    pause::what_is_paused_is_stopped_started_and_destroyed,
    pause::without_quorum_it_is_frozen_and_thawed,
    exec::short_commands_end_no_long_one,
    quorum::without_it_changes_are_refused,
    quorum::without_pmxcfs_nothing_is_known,
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
