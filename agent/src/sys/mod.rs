//! The kernel: one syscall a function, and the only `unsafe` of the product. Knows nothing of PVE.
//!
//! Roots such as `/proc` are parameters, so that what reads them is tested on trees in a tempdir.

pub mod child;
pub mod flock;
pub mod heap;
pub mod image;
pub mod inherited;
pub mod netns;
pub mod packet;
pub mod pidfd;
pub mod privileges;
pub mod proc;
pub mod read;
pub mod seqpacket;
