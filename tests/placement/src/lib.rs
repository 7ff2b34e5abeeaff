//! The workload on which placement is measured: a cluster with nodes of three sizes, foreign
//! guests, faults, bursts, lost and late reports and controllers that do not see each other. The
//! product's placement and published algorithms run on the same requests.
//!
//! ```text
//!  scenario (all that is drawn before a run) -> world (events in order of time)
//!      host: a node and its agent               ours: controller::placement, as it is shipped
//!      measure: what is counted                 peers, view, topsis: the published algorithms
//!  bench: everything, in parallel -> expected (are the peers what they are known for?), gates
//!  cost: what a decision takes by the real clock; nothing else here knows one
//! ```

mod bench;
mod cost;
mod expected;
mod gates;
mod host;
mod measure;
mod ours;
mod peers;
mod scenario;
mod stream;
mod topsis;
mod view;
mod world;

pub use bench::{Report, Seeds, bench};
pub use cost::{decide, decision_ns, fleet};
pub use measure::Measured;
pub use ours::SNAPSHOT;
pub use peers::Peer;
pub use scenario::Scenario;
pub use world::{Algorithm, run};
