//! Exec ids as people type them: whole, or a beginning that only one of the sandbox's commands has.

use proto::{
    Reason,
    sandbox::v1::{ExecInfo, ListExecsRequest},
};

use crate::{
    client::{Controller, patient},
    failure::Failure,
};

/// Reads the commands of a sandbox.
///
/// # Errors
/// When the call failed.
pub(super) async fn list(controller: &Controller, id: &str) -> Result<Vec<ExecInfo>, Failure> {
    let call = || {
        let (mut client, request) = (
            controller.sandboxes.clone(),
            ListExecsRequest { id: id.to_owned(), ..Default::default() },
        );
        async move { client.list_execs(request).await }
    };
    Ok(patient(call).await?.execs)
}

/// Finds the only command that is meant.
///
/// # Errors
/// When there is none, several are meant, or they cannot be listed.
pub(super) async fn find(
    controller: &Controller,
    id: &str,
    typed: String,
) -> Result<ExecInfo, Failure> {
    let execs = list(controller, id).await?;
    let exec_id = choose(&execs, typed)?;
    let found = execs.into_iter().find(|exec| exec.exec_id == exec_id);
    found.ok_or_else(|| none(&exec_id))
}

/// Failure for a word that means no command.
pub(super) fn none(typed: &str) -> Failure {
    let what = format!("there is no command {typed} in the sandbox");
    Failure::of_reason(Reason::ExecNotFound, what)
}

/// Whole exec id of what the user typed; a random one needs no call. What names no command is
/// returned as it is, and the API says so.
///
/// # Errors
/// When several commands are meant, or they cannot be listed.
pub(super) async fn resolve(
    controller: &Controller,
    id: &str,
    typed: String,
) -> Result<String, Failure> {
    if typed.parse::<uuid::Uuid>().is_ok() {
        return Ok(typed);
    }
    choose(&list(controller, id).await?, typed)
}

/// Finds the only command whose exec id begins with what was typed; a whole one wins.
///
/// # Errors
/// When several commands are meant.
pub(super) fn choose(execs: &[ExecInfo], typed: String) -> Result<String, Failure> {
    if typed.is_empty() || execs.iter().any(|exec| exec.exec_id == typed) {
        return Ok(typed);
    }
    let found: Vec<_> = execs
        .iter()
        .map(|exec| exec.exec_id.as_str())
        .filter(|exec_id| exec_id.starts_with(&typed))
        .collect();
    match found.as_slice() {
        [] => Ok(typed),
        [only] => Ok((*only).to_owned()),
        several => Err(Failure::usage(
            format!("{} commands are named by {typed}: {}", several.len(), several.join(", ")),
            "give more of the exec id; `sandboxctl ps ID -o wide` lists them",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn beginning_of_an_exec_id_names_one_command() {
        let exec = |exec_id: &str| ExecInfo { exec_id: exec_id.into(), ..ExecInfo::default() };
        let execs = [exec("0b7d5ad4-2f5c"), exec("0b7d5ad4-3f5c"), exec("build"), exec("build-2")];
        let found = |typed: &str| choose(&execs, typed.into()).ok();
        assert_eq!(found("0b7d5ad4-2").as_deref(), Some("0b7d5ad4-2f5c"));
        assert_eq!(found("build").as_deref(), Some("build"), "a whole one wins");
        assert_eq!(found("none").as_deref(), Some("none"));
        assert_eq!(found("0b7d"), None);
    }
}
