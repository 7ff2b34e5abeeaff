//! Interface to the kernel: one syscall a function, and the only `unsafe` of the product.
//! Independent of PVE.
//!
//! Roots such as `/proc` are parameters, so that tests can use a tree in a tempdir.

pub mod apart;
pub mod child;
pub mod flock;
pub mod heap;
pub mod image;
pub mod inherited;
pub mod netns;
pub mod new_dirs;
pub mod packet;
pub mod pidfd;
pub mod privileges;
pub mod proc;
pub mod psi;
pub mod read;
pub mod seqpacket;
pub mod sock_diag;
pub mod tcp_table;
