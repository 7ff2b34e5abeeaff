//! One file a verb.

mod completion;
mod create;
mod exec;
mod explain;
mod expose;
mod fsck;
mod get;
mod hide;
mod lifecycle;
mod ls;
mod man;
mod nodes;
mod pause;
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
    failure::{Failure, exit},
    output::Output,
    settings::Settings,
};

/// Runs the verb; the number is the exit code.
///
/// # Errors
/// When it could not do what it should.
pub async fn run(args: Args) -> Result<u8, Failure> {
    let Args { global, verb } = args;
    let output = Output::new(global.json);
    match verb {
        Verb::Completion { shell } => completion::run(shell, output),
        Verb::Man { dir } => man::run(dir, output),
        Verb::Version => version::run(&global, output).await,
        Verb::Exec(exec) => {
            // Whatever we fail at must not look like an exit code of the command.
            let ended = match connect(&global) {
                Ok(controller) => exec::run(controller, exec, output).await,
                Err(failure) => Err(failure),
            };
            ended.map_err(|failure| match failure.exit {
                exit::PIPE => failure,
                _ => failure.exit(exit::EXEC),
            })
        }
        Verb::Create(create) => create::run(connect(&global)?, create, output).await,
        Verb::Ls(ls) => ls::run(connect(&global)?, ls, output).await,
        Verb::Get(one) => get::run(connect(&global)?, one.id, output).await,
        Verb::Start(many) => lifecycle::start(connect(&global)?, many, output).await,
        Verb::Stop(many) => lifecycle::stop(connect(&global)?, many, output).await,
        Verb::Pause(pause) => pause::pause(connect(&global)?, pause, output).await,
        Verb::Resume(many) => pause::resume(connect(&global)?, many, output).await,
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
        Verb::Watch(one) => watch::run(connect(&global)?, one.id, output).await,
    }
}

fn connect(global: &Global) -> Result<Controller, Failure> {
    Controller::new(&Settings::find(global)?)
}
