//! Verbs, one file each.

mod adopt;
mod clean;
mod completion;
mod cp;
mod create;
mod events;
mod exec;
mod explain;
mod expose;
mod fsck;
mod get;
mod hide;
mod kill;
mod lifecycle;
mod lifetime;
mod logs;
mod ls;
mod man;
mod node;
mod nodes;
mod pause;
mod ps;
mod snapshot;
mod top;
mod url;
mod version;
mod wake_on;
mod wanted;
mod watch;

use crate::{
    args::{Args, Global, Verb},
    client::Controller,
    exit,
    failure::Failure,
    output::Output,
    settings::Settings,
};

/// Runs the verb; returns the exit code.
///
/// # Errors
/// When the verb fails.
pub async fn run(args: Args) -> Result<u8, Failure> {
    let Args { global, verb } = args;
    let output = Output::new(global.json);
    match verb {
        Verb::Completion { shell } => completion::run(shell, output),
        Verb::Man { dir } => man::run(dir, output),
        Verb::Version => version::run(&global, output).await,
        Verb::Exec(exec) => {
            Box::pin(own(async { exec::run(connect(&global)?, exec, output).await })).await
        }
        Verb::Logs(logs) if logs.follow => {
            Box::pin(own(async { logs::run(connect(&global)?, logs, output).await })).await
        }
        Verb::Logs(logs) => logs::run(connect(&global)?, logs, output).await,
        Verb::Ps(one) => ps::run(connect(&global)?, one.id, output).await,
        Verb::Kill(kill) => kill::run(connect(&global)?, kill, output).await,
        Verb::Cp(cp) => cp::run(connect(&global)?, cp, output).await,
        Verb::Create(create) => create::run(connect(&global)?, create, output).await,
        Verb::Ls(ls) => ls::run(connect(&global)?, ls, output).await,
        Verb::Get(one) => get::run(connect(&global)?, one.id, output).await,
        Verb::Start(many) => lifecycle::start(connect(&global)?, many, output).await,
        Verb::Stop(many) => lifecycle::stop(connect(&global)?, many, output).await,
        Verb::Pause(pause) => pause::pause(connect(&global)?, pause, output).await,
        Verb::Resume(many) => pause::resume(connect(&global)?, many, output).await,
        Verb::Gc(wish) => clean::gc(connect(&global)?, wish, output).await,
        Verb::Prune(wish) => clean::prune(connect(&global)?, wish, output).await,
        Verb::Compare(wish) => clean::compare(connect(&global)?, wish, output).await,
        Verb::Recover(wish) => clean::recover(connect(&global)?, wish, output).await,
        Verb::Adopt(wish) => adopt::adopt(connect(&global)?, wish, output).await,
        Verb::Release(wish) => adopt::release(connect(&global)?, wish, output).await,
        Verb::Cordon(wish) => node::cordon(connect(&global)?, wish, output).await,
        Verb::Uncordon(wish) => node::uncordon(connect(&global)?, wish, output).await,
        Verb::Drain(wish) => node::drain(connect(&global)?, wish, output).await,
        Verb::Node(wish) => node::node(connect(&global)?, wish, output).await,
        Verb::Lifetime(wish) => lifetime::run(connect(&global)?, wish, output).await,
        Verb::WakeOn(wake_on) => wake_on::run(connect(&global)?, wake_on, output).await,
        Verb::Top(top) => top::run(connect(&global)?, top, output).await,
        Verb::Rm(many) => lifecycle::rm(connect(&global)?, many, output).await,
        Verb::Expose(expose) => expose::run(connect(&global)?, expose, output).await,
        Verb::Hide(hide) => hide::run(connect(&global)?, hide, output).await,
        Verb::Url(url) => url::run(connect(&global)?, url, output).await,
        Verb::Snapshot(_) => snapshot::ls(connect(&global)?, output).await,
        Verb::Nodes => nodes::run(connect(&global)?, output).await,
        Verb::Explain(explain) => explain::run(connect(&global)?, explain, output).await,
        Verb::Fsck => fsck::run(connect(&global)?, output).await,
        Verb::Events(events) => events::run(connect(&global)?, events, output).await,
        Verb::Watch(one) => watch::run(connect(&global)?, one.id, output).await,
    }
}

/// Replaces our own failures' exit codes, which must not look like the command's.
async fn own(ended: impl Future<Output = Result<u8, Failure>>) -> Result<u8, Failure> {
    ended.await.map_err(|failure| match failure.exit {
        exit::PIPE => failure,
        _ => failure.exit(exit::EXEC),
    })
}

fn connect(global: &Global) -> Result<Controller, Failure> {
    Controller::new(&Settings::find(global)?)
}
