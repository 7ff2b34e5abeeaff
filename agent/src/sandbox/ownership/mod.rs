//! Whose sandbox a container is: adopted, released, recovered, moved between nodes.

pub(super) mod adopt;
pub(super) mod migrate;
pub(super) mod recover;
pub(super) mod release;
