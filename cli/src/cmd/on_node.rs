//! Table of the sandboxes on a node, as `node drain` and `node forget` show them.

use proto::sandbox::v1::Sandbox;

use crate::output::{
    layout::Column,
    short::Part,
    table::{self, Table},
    time,
};

const COLUMNS: &[Column] = &[
    Column::new("ID").ids(Part::End),
    Column::new("TEAM").rank(1),
    Column::new("VMID").rank(3).right(),
    Column::new("PHASE"),
    Column::new("EXPIRES").rank(2),
];

/// Lists sandboxes of a node.
pub(super) fn table(sandboxes: &[Sandbox]) -> Table {
    let mut table = Table::new(COLUMNS);
    for sandbox in sandboxes {
        table.row(vec![
            table::cell(&sandbox.id),
            table::cell(&sandbox.team),
            table::vmid(sandbox.vmid),
            table::phase(sandbox.phase(), ""),
            table::cell(time::rfc3339(sandbox.expires_at).unwrap_or_default()),
        ]);
    }
    table
}
