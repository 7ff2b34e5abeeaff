//! `gc`, `prune`, `compare` and `recover`: remove leftovers, and bring sandboxes back.

use std::{io::Read, time::Duration};

use proto::sandbox::v1::{
    CollectGarbageRequest, CompareSandboxesRequest, PruneSandboxesRequest, RecoverSandboxRequest,
};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    args::{Compare, Gc, Prune, Recover},
    client::{Controller, answer, promised},
    exit,
    failure::Failure,
    output::{Output, json, table, time},
    progress::Spinner,
};

/// Deadline of the calls: they check every node, or delete many sandboxes.
const WAIT: Duration = Duration::from_secs(300);
/// Size of a list of ids, bytes, at most: 10000 of them and some room.
const LIST_MAX: u64 = 1 << 20;

pub(super) async fn gc(controller: Controller, wish: Gc, output: Output) -> Result<u8, Failure> {
    let request =
        CollectGarbageRequest { dry_run: wish.dry_run, node: wish.node.unwrap_or_default() };
    let spinner = Spinner::new(output.json, "asking the nodes");
    let mut operator = controller.operator.clone();
    let found = timeout(WAIT, operator.collect_garbage(request))
        .await
        .map_err(|_| Failure::deadline("the nodes did not answer", WAIT))??
        .into_inner();
    drop(spinner);
    if output.json {
        let item = |item: &proto::sandbox::v1::GarbageItem| {
            json!({
                "node": item.node, "action": item.action, "subject": item.subject, "why": item.why,
            })
        };
        let items: Vec<_> = found.items.iter().map(item).collect();
        output.value(&json!({ "items": items, "unreachable": found.unreachable }))?;
    } else {
        if !found.items.is_empty() {
            let mut rows = table::new(output, &["NODE", "ACTION", "SUBJECT", "BECAUSE"]);
            for item in &found.items {
                let cells = [&item.node, &item.action, &item.subject, &item.why];
                rows.add_row(cells.map(table::cell));
            }
            output.styled(table::text(&rows))?;
        }
        output.line(match (found.items.len(), wish.dry_run) {
            (0, _) => "there is nothing to clean up".to_owned(),
            (count, true) => format!("{count} found; nothing was done"),
            (count, false) => format!("{count} found; the nodes are cleaning up now"),
        })?;
    }
    for node in &found.unreachable {
        output.note(format!("{node} did not answer"));
    }
    Ok(if found.unreachable.is_empty() { 0 } else { exit::REFUSED })
}

pub(super) async fn prune(
    controller: Controller,
    wish: Prune,
    output: Output,
) -> Result<u8, Failure> {
    let request = PruneSandboxesRequest {
        older_than: prost_types::Duration::try_from(wish.older_than).ok(),
        paused: wish.paused,
        dry_run: wish.dry_run,
    };
    let spinner = Spinner::new(output.json, "looking for what has been stopped for long");
    let mut sandboxes = controller.sandboxes.clone();
    let pruned = timeout(WAIT, sandboxes.prune_sandboxes(request))
        .await
        .map_err(|_| Failure::deadline("the deletions did not end", WAIT))??
        .into_inner()
        .sandboxes;
    drop(spinner);
    let failed = pruned.iter().any(|one| !one.error.is_empty());
    if output.json {
        let one = |one: &proto::sandbox::v1::PrunedSandbox| {
            json!({
                "sandbox": one.sandbox.as_ref().map(json::sandbox),
                "deleted": one.deleted,
                "error": one.error,
            })
        };
        output.value(&pruned.iter().map(one).collect::<Vec<_>>())?;
    } else {
        let mut rows = table::new(output, &["ID", "NODE", "PHASE", "FOR", "OUTCOME"]);
        for one in &pruned {
            let Some(sandbox) = &one.sandbox else { continue };
            let outcome = match (one.deleted, one.error.as_str()) {
                (true, _) => "deleted",
                (false, "") => "would be deleted",
                (false, why) => why,
            };
            let phase = json::phase(sandbox.phase());
            let since = time::age(sandbox.since);
            let cells = [&sandbox.id, &sandbox.node, phase, &since, outcome];
            rows.add_row(cells.map(table::cell));
        }
        if pruned.is_empty() {
            output.line("nothing has been stopped for so long")?;
        } else {
            output.styled(table::text(&rows))?;
        }
    }
    Ok(if failed { exit::REFUSED } else { 0 })
}

pub(super) async fn compare(
    controller: Controller,
    wish: Compare,
    output: Output,
) -> Result<u8, Failure> {
    let known_ids = read(&wish.file)?;
    let request = CompareSandboxesRequest { known_ids };
    let found = answer(controller.sandboxes.clone().compare_sandboxes(request)).await?;
    let same = found.unlisted.is_empty() && found.missing.is_empty();
    if output.json {
        let unlisted: Vec<_> = found.unlisted.iter().map(json::sandbox).collect();
        output.value(&json!({
            "unlisted": unlisted, "missing": found.missing, "complete": found.complete,
        }))?;
    } else {
        for sandbox in &found.unlisted {
            let phase = json::phase(sandbox.phase());
            output.line(format!("+ {} {phase} on {}", sandbox.id, sandbox.node))?;
        }
        for id in &found.missing {
            output.line(format!("- {id}"))?;
        }
        if same {
            output.line("the list is what there is")?;
        }
    }
    if !found.complete {
        output.note("a node does not answer: what is missing may be there");
    }
    Ok(if same { 0 } else { exit::REFUSED })
}

/// Reads the ids of a file, one a line.
fn read(file: &std::path::Path) -> Result<Vec<String>, Failure> {
    let mut text = String::new();
    let unread = |error: std::io::Error| {
        Failure::usage(format!("{}: {error}", file.display()), "name a file, or - for stdin")
    };
    if file == std::path::Path::new("-") {
        std::io::stdin().take(LIST_MAX).read_to_string(&mut text).map_err(unread)?;
    } else {
        let opened = std::fs::File::open(file).map_err(unread)?;
        opened.take(LIST_MAX).read_to_string(&mut text).map_err(unread)?;
    }
    if text.len() as u64 == LIST_MAX {
        return Err(Failure::usage("the list is too long", "at most 10000 ids, one a line"));
    }
    Ok(text.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect())
}

pub(super) async fn recover(
    controller: Controller,
    wish: Recover,
    output: Output,
) -> Result<u8, Failure> {
    let request = RecoverSandboxRequest { node: wish.node, vmid: wish.vmid, dry_run: wish.dry_run };
    let mut operator = controller.operator.clone();
    let sandbox = promised(answer(operator.recover_sandbox(request)).await?.sandbox)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
    } else {
        let verb = if wish.dry_run { "would be" } else { "is" };
        let phase = json::phase(sandbox.phase());
        output.line(format!("{} {verb} {phase} again, of team {}", sandbox.id, sandbox.team))?;
    }
    Ok(0)
}
