//! Ten concurrent creations of one template: PVE itself would fail nine of them.

use crate::world::{id, world};

#[test]
fn ten_creations_of_one_template_all_succeed() {
    let Some(world) = world() else { return };
    let made = world.json(&["create", "--count", "10", "--node", "node1"]);
    let made = made.as_array().expect("a list");
    for sandbox in made {
        world.mine(id(sandbox));
        assert_eq!((&sandbox["phase"], &sandbox["node"]), (&"running".into(), &"node1".into()));
    }
    let unique = |key: &str| {
        made.iter().map(|s| s[key].to_string()).collect::<std::collections::BTreeSet<_>>().len()
    };
    assert_eq!((made.len(), unique("id"), unique("vmid"), unique("ip")), (10, 10, 10, 10));
    world.finish();
}
