//! Operations on containers through Debian's LXC.

pub(crate) mod attach;
pub(crate) mod cgroup;
pub(crate) mod config;
pub(crate) mod control;
pub(crate) mod guest;
pub(crate) mod hooks;
pub(crate) mod live;
pub(crate) mod state;
