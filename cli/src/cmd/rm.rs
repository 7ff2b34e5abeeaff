//! `rm`: deletes sandboxes; on a terminal asks before it deletes what runs, or several at once.

use clap::Args;
use futures_util::future::join_all;
use proto::sandbox::v1::{DeleteSandboxRequest, Phase, Sandbox};

use super::{
    lifecycle::{Change, change, settled},
    ls,
    targets::Many,
};
use crate::{
    ask,
    client::{Controller, Sandboxes, fetch},
    exit,
    failure::Failure,
    output::{Output, json, table::View},
};

/// Arguments of `rm`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl rm ID                              asks on a terminal, if it runs
  sandboxctl rm -f ID1 ID2                      asks nothing
  sandboxctl ls -q --filter phase=stopped | xargs sandboxctl rm

Several are listed first, and there is one question. Where there is no terminal
nothing is asked.")]
pub(crate) struct Rm {
    /// Sandboxes.
    #[command(flatten)]
    pub(super) sandboxes: Many,
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Do not wait for the end of what takes longer than a call
    #[arg(long)]
    no_wait: bool,
}

/// Sandboxes that are read at once.
const AT_ONCE: usize = 32;

pub(super) async fn run(controller: Controller, rm: Rm, output: Output) -> Result<u8, Failure> {
    let Rm { sandboxes, force, no_wait } = rm;
    let asks = !force && !output.json && ask::is_possible();
    if asks && !is_meant(&controller, &sandboxes.ids, output).await? {
        output.note("nothing was deleted; -f asks nothing");
        return Ok(exit::REFUSED);
    }
    let call = |mut client: Sandboxes, id| async move {
        Ok(client.delete_sandbox(DeleteSandboxRequest { id }).await?.map(|told| told.sandbox))
    };
    let asked = Change { sandboxes, no_wait };
    change(controller, asked, output, call, |now| settled(now, Phase::Deleted)).await
}

/// Asks whether these are to be deleted, where there is something to ask.
async fn is_meant(
    controller: &Controller,
    ids: &[String],
    output: Output,
) -> Result<bool, Failure> {
    let mut sandboxes = Vec::new();
    for some in ids.chunks(AT_ONCE) {
        sandboxes.extend(join_all(some.iter().map(|id| fetch(controller, id.clone()))).await);
    }
    // What cannot be read is told by the deletion, without the others.
    let found: Vec<_> = match sandboxes.len() {
        1 => sandboxes.into_iter().collect::<Result<_, _>>()?,
        _ => sandboxes.into_iter().flatten().collect(),
    };
    let Some(question) = question(&found) else { return Ok(true) };
    if found.len() > 1 {
        let view = View { room: output.room, ..View::default() };
        ls::table(&found).lines(&view)?.iter().for_each(|line| output.note(line));
    }
    let answer = ask::line(&format!("{question} [y/N] ")).await?;
    Ok(matches!(answer.to_lowercase().as_str(), "y" | "yes"))
}

/// Question before these are deleted; none where one sandbox is lost that does not run.
fn question(sandboxes: &[Sandbox]) -> Option<String> {
    match sandboxes {
        [] => None,
        [one] => {
            let at_rest = matches!(
                one.phase(),
                Phase::Stopped | Phase::Failed | Phase::Deleted | Phase::Deleting
            );
            let phase = json::phase(one.phase());
            (!at_rest)
                .then(|| format!("{} on {} is {phase}. Delete it for good?", one.id, one.node))
        }
        several => Some(format!("Delete these {} sandboxes for good?", several.len())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn question_is_asked_for_what_runs_and_for_several() {
        let one = |phase: Phase| Sandbox {
            id: "x".into(),
            node: "pve2".into(),
            phase: phase.into(),
            ..Sandbox::default()
        };
        for phase in [Phase::Stopped, Phase::Failed, Phase::Deleted] {
            assert_eq!(question(&[one(phase)]), None, "{phase:?}");
        }
        let asked = question(&[one(Phase::Paused)]).expect("asked");
        assert_eq!(asked, "x on pve2 is paused. Delete it for good?");
        let asked = question(&[one(Phase::Stopped), one(Phase::Stopped)]).expect("asked");
        assert_eq!(asked, "Delete these 2 sandboxes for good?");
        assert_eq!(question(&[]), None);
    }
}
