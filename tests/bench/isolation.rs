//! Probes from inside a sandbox: number tried, and number that got through.

use anyhow::{Result, ensure};
use lab::probes::{self, Lan, Seen};

use crate::{figures::Figures, world::World};

const NODE: &str = "node1";
const OTHER_NODE: &str = "node2";

pub(crate) async fn measure(world: &World, figures: &mut Figures) -> Result<()> {
    let other_team = world.other_team()?;
    let (own, other) = (world.create(NODE).await?, other_team.create(NODE).await?);
    let there = other_team.create(OTHER_NODE).await?;
    let of = |sandbox: proto::sandbox::v1::Sandbox| Seen::new(sandbox.vmid.into(), &sandbox.ip);
    let (from, victim) = (of(world.get(&own).await?)?, of(other_team.get(&other).await?)?);
    let far = of(other_team.get(&there).await?)?;
    let (node, other_node) = (world.lab.node(NODE)?, world.lab.node(OTHER_NODE)?);
    let lan = Lan::new(&node, &other_node)?;
    // Blocks on programs in the node; nothing else runs here.
    let mut closed = probes::closed(&node, &victim)?;
    closed.extend(probes::of_another_node(&other_node));
    closed.extend(probes::of_far_sandbox(&far));
    let reached = probes::reach(&node, from.vmid, &closed)?;
    let drawn = probes::spoofs(&node, &from, &victim)?;
    let told = probes::errors(&node, &from, &victim)?;
    let open = probes::reach(&node, from.vmid, &probes::open())?;
    drop(lan);
    ensure!(open.values().all(|reached| *reached), "the way out is closed: {open:?}");
    let words = reached.iter().map(|(name, through)| (name.clone(), *through));
    let frames = drawn.iter().map(|(name, through)| ((*name).to_owned(), *through));
    let errors = told.iter().map(|(who, through)| (format!("an error to the {who}"), *through));
    let all: Vec<_> = words.chain(frames).chain(errors).collect();
    for (name, _) in all.iter().filter(|(_, through)| *through) {
        println!("isolation: {name} got through");
    }
    #[expect(clippy::cast_precision_loss, reason = "a count of some dozens")]
    let count = |through: bool| all.iter().filter(|probe| !through || probe.1).count() as f64;
    figures.alone("isolation_probes", count(false), "tried");
    figures.alone("isolation_probes_through", count(true), "of them");
    world.delete(&own).await?;
    other_team.delete(&there).await?;
    other_team.delete(&other).await
}
