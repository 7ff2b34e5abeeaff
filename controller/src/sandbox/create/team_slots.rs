//! Slots of creations that the teams share, so that one team with many creations leaves slots for the others.

use daemon::shares::{Place, Places};
use proto::name::Team;

/// A number of slots. A team gets a share of them, as in `daemon::shares`.
pub(in crate::sandbox) type TeamSlots = Places<Team>;

/// Slot of a team, given back when it is dropped.
pub(super) type TeamSlot = Place<Team>;
