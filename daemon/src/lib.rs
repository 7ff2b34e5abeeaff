//! Infrastructure of every daemon: configuration, logs, TLS, listening, stopping, the form of errors
//! on the wire, and what is written to the disk in groups, in one step or in a chain of hashes. No domain.

pub mod audit;
pub mod chain;
pub mod channel;
pub mod clock;
pub mod config;
pub mod core_dumps;
pub mod disk;
pub mod doctor;
pub mod flow;
pub mod group_commit;
pub mod key_files;
pub mod keyed_count;
pub mod keyed_lock;
pub mod listen;
pub mod logs;
pub mod mac;
pub mod peer;
pub mod replace;
pub mod seal;
pub mod seldom;
pub mod sever;
pub mod shares;
pub mod status;
pub mod stop;
pub mod sync;
pub mod systemctl;
pub mod text;
pub mod tls;
pub mod version;
pub mod web;
