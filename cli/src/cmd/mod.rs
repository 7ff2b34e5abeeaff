//! Verbs, one file each: its arguments with their help text, and what it does. Several verbs share
//! `lifecycle` and `wanted`.

mod admin;
mod adopt;
mod attach;
mod audit;
mod client_key;
mod compare;
mod complete;
mod completion;
mod console;
mod context;
mod cordon;
mod cp;
mod create;
mod current;
mod doctor;
mod drain;
mod egress;
mod events;
mod exec;
mod exec_id;
mod explain;
mod expose;
mod filter;
mod first_files;
mod fsck;
mod gc;
mod get;
mod hide;
mod ingress;
mod inspect;
mod kill;
mod lifecycle;
mod lifetime;
mod link;
mod login;
mod logs;
mod ls;
mod ls_watch;
mod man;
mod named;
mod node;
mod node_revoke;
mod node_token;
mod nodes;
mod on_node;
mod pause;
mod port;
mod port_forward;
mod prune;
mod ps;
mod recover;
mod release;
mod rename;
mod resize;
mod resume;
mod revoke;
mod rm;
mod run;
#[cfg(test)]
mod screens;
mod set;
mod shell;
mod snapshot;
mod ssh;
mod ssh_config;
mod ssh_key;
mod start;
mod stop;
mod targets;
mod team;
mod token;
mod top;
mod uncordon;
mod url;
mod validity;
mod version;
mod wait;
mod wake_on;
mod wanted;
mod watch;

use std::cell::RefCell;

use clap::{Command, Subcommand};

use crate::{
    client::Controller,
    exit,
    failure::Failure,
    output::Output,
    settings::{Connection, Settings},
};

/// A verb with its arguments.
#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Verbs that every token may use.
    #[command(flatten)]
    User(Box<User>),
    /// Verbs that need an operator's token.
    #[command(flatten)]
    Operator(Operator),
}

/// The verbs for users of sandboxes.
#[derive(Debug, Subcommand)]
pub(crate) enum User {
    /// Create a sandbox and run a command in it
    Run(run::Run),
    /// Create a sandbox and wait until it answers
    Create(create::Create),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls(ls::Ls),
    /// Show one sandbox
    Get(get::Get),
    /// Print everything about sandboxes as JSON
    Inspect(inspect::Inspect),
    /// Run a command in a sandbox
    Exec(exec::Exec),
    /// Open a login shell in a sandbox
    Shell(shell::Shell),
    /// Connect to a sandbox with the `ssh` of this machine
    Ssh(ssh::Ssh),
    /// List the commands that a sandbox runs and ran
    Ps(ps::Ps),
    /// Print the output of a command
    Logs(logs::Logs),
    /// Follow a command that runs already, and type into it
    Attach(attach::Attach),
    /// Print what a sandbox itself has logged
    Console(console::Console),
    /// Signal a command and all that it started
    Kill(kill::Kill),
    /// Copy files and directories into a sandbox or out of it
    Cp(cp::Cp),
    /// Wait until a sandbox runs, is stopped or deleted, or listens on a port
    Wait(wait::Wait),
    /// Boot stopped sandboxes
    Start(lifecycle::Change),
    /// Stop sandboxes; their disks are kept
    Stop(stop::Stop),
    /// Freeze running sandboxes: their memory is kept, nothing in them runs
    Pause(pause::Pause),
    /// Thaw paused sandboxes
    Resume(resume::Resume),
    /// Set or show what wakes a paused sandbox
    WakeOn(wake_on::WakeOn),
    /// Set or show what a sandbox can reach on the network
    Egress(egress::Egress),
    /// Give a sandbox another name
    Rename(rename::Rename),
    /// Give a sandbox other cores, memory or disk
    Resize(resize::Resize),
    /// Set or remove metadata of a sandbox
    Set(set::Set),
    /// Set or show how long a sandbox lives
    Lifetime(lifetime::SetLifetime),
    /// Show what sandboxes use, each second
    Top(top::Top),
    /// Delete sandboxes, for good
    #[command(visible_alias = "delete")]
    Rm(rm::Rm),
    /// Open a port of a sandbox to HTTP and print its address
    Expose(expose::Expose),
    /// Close a port again, at once
    Hide(hide::Hide),
    /// Print a link to an open port for a browser, or a token for a program
    Link(link::Link),
    /// Make all links, tokens and sessions of an open port void, at once
    Revoke(revoke::Revoke),
    /// Print the address of an open port, or of all of them
    Url(url::Url),
    /// Forward a port of a sandbox to this machine, or the other way round
    PortForward(port_forward::PortForward),
    /// Ports of a sandbox: list what listens
    #[command(subcommand)]
    Port(port::Port),
    /// The way in from the web: test the open ports of a sandbox
    #[command(subcommand)]
    Ingress(ingress::Ingress),
    /// Snapshots that sandboxes are created from
    #[command(subcommand)]
    Snapshot(snapshot::Snapshot),
    /// SSH keys of your team: add, list or remove them
    #[command(subcommand)]
    SshKey(ssh_key::SshKeyVerb),
    /// Print or write the lines by which `ssh NAME` reaches a sandbox
    SshConfig(ssh_config::SshConfig),
    /// Say why a sandbox is where it is, or where one would go now
    Explain(explain::Explain),
    /// Delete sandboxes that have been stopped for long
    #[command(hide = true)]
    Prune(prune::Prune),
    /// Compare a list of ids with what there is, both ways; exit 1 if they differ
    #[command(hide = true)]
    Compare(compare::Compare),
    /// Print every change of a sandbox until it is gone
    Watch(watch::Watch),
    /// Print what happened: who asked for what, and what the system did by itself
    Events(events::Events),
    /// Choose the sandbox that @current means
    Use(current::Use),
    /// Choose a controller and a token, and save them as a context
    Login(login::Login),
    /// Contexts: controllers with a token, one of which is used
    #[command(subcommand)]
    Context(context::ContextVerb),
    /// Say what is wrong with connection and token, and for operators with the nodes; exit 1 if something
    /// does not work
    #[command(after_help = "\
Examples:
  sandboxctl doctor  each check, and what mends what is wrong
  sandboxctl doctor --json | jq '.checks[] | select(.state != \"ok\")'

It changes nothing. On a node: `pve-sandbox-agent doctor`; on the controller's
machine: `pve-sandbox-controller doctor`.")]
    Doctor,
    /// Print the versions of this program and of the controller
    Version,
    /// Print a completion script for a shell
    Completion(completion::Completion),
    /// Print what can come next in a command line
    #[command(name = "__complete", hide = true)]
    Complete(complete::Complete),
    /// Write the man pages to a folder, or the main one to stdout
    Man(man::Man),
}

/// The verbs for operators of nodes.
#[derive(Debug, Subcommand)]
pub(crate) enum Operator {
    /// Nodes: list, join, revoke, cordon, uncordon, drain or forget them
    #[command(subcommand)]
    Node(node::Node),
    /// The whole system: fsck, gc, prune, compare, adopt, recover, release
    #[command(subcommand)]
    Admin(admin::Admin),
    /// Tokens of teams: create, list or revoke them
    #[command(subcommand)]
    Token(token::TokenVerb),
    /// Teams: what they have, what they may have, and how often they may create
    #[command(subcommand)]
    Team(team::TeamVerb),
    /// Audit log: list, export or verify it
    #[command(subcommand)]
    Audit(audit::AuditVerb),
    /// List the nodes and their load; short for `node ls`
    #[command(hide = true)]
    Nodes(nodes::Nodes),
    /// Check that nothing is lost, leaked or doubled; short for `admin fsck`
    #[command(hide = true)]
    Fsck,
    /// Let the nodes clean up now; short for `admin gc`
    #[command(hide = true)]
    Gc(gc::Gc),
    /// Take a container back that carries our mark; short for `admin recover`
    #[command(hide = true)]
    Recover(recover::Recover),
    /// Make a sandbox of a container that was made without us; short for `admin adopt`
    #[command(hide = true)]
    Adopt(adopt::Adopt),
    /// End a sandbox and leave its container; short for `admin release`
    #[command(hide = true)]
    Release(release::Release),
    /// Give a node no new sandboxes; short for `node cordon`
    #[command(hide = true)]
    Cordon(cordon::Cordon),
    /// Give a node new sandboxes again; short for `node uncordon`
    #[command(hide = true)]
    Uncordon(uncordon::Uncordon),
    /// Let a node become empty; short for `node drain`
    #[command(hide = true)]
    Drain(drain::Drain),
}

/// Runs the verb; returns the exit code. `definition` is the command line, for what is made of it.
///
/// # Errors
/// When the verb fails.
pub(crate) async fn run(
    mut verb: Verb,
    connection: &Connection,
    output: Output,
    definition: fn() -> Command,
) -> Result<u8, Failure> {
    // One connection, also where a name must be looked up first.
    let made = RefCell::new(None);
    let connect = || {
        let mut made = made.borrow_mut();
        match &*made {
            Some(controller) => Ok(Controller::clone(controller)),
            None => Ok(made.insert(Controller::new(&Settings::find(connection)?)?).clone()),
        }
    };
    let runs_a_command = matches!(&verb, Verb::User(verb) if verb.runs_a_command());
    let ended = async {
        named::resolve(&mut verb, &connect).await?;
        match verb {
            // A file is verified without a controller.
            Verb::Operator(Operator::Audit(audit::AuditVerb::Verify(audit::Verify {
                file: Some(file),
                head,
            }))) => audit::verify_file(&file, head, output),
            Verb::User(verb) => {
                Box::pin(user(*verb, connect, connection, output, definition)).await
            }
            Verb::Operator(verb) => operator(verb, connect()?, output).await,
        }
    };
    Box::pin(ended).await.map_err(|failure| if runs_a_command { own(failure) } else { failure })
}

impl User {
    /// Whether the exit code is that of a command in a sandbox.
    fn runs_a_command(&self) -> bool {
        matches!(
            self,
            Self::Exec(_) | Self::Run(_) | Self::Shell(_) | Self::Ssh(_) | Self::Attach(_)
        ) || matches!(self, Self::Logs(logs) if logs.follow)
    }
}

async fn user(
    verb: User,
    connect: impl Fn() -> Result<Controller, Failure>,
    connection: &Connection,
    output: Output,
    definition: fn() -> Command,
) -> Result<u8, Failure> {
    match verb {
        User::Run(args) => Box::pin(run::run(connect()?, args, output)).await,
        User::Create(args) => create::run(connect()?, args, output).await,
        User::Ls(args) if args.watch => ls_watch::run(connect()?, args, output).await,
        User::Ls(args) => ls::run(connect()?, args, output).await,
        User::Get(args) => get::run(connect()?, args, output).await,
        User::Inspect(args) => inspect::run(connect()?, args, output).await,
        User::Shell(args) => Box::pin(shell::run(connect()?, args, output)).await,
        User::Wait(args) => wait::run(connect()?, args, output).await,
        User::Exec(args) => Box::pin(exec::run(connect()?, args, output)).await,
        User::Ps(args) => ps::run(connect()?, args, output).await,
        User::Logs(args) => logs::run(connect()?, args, output).await,
        User::Attach(args) => Box::pin(attach::run(connect()?, args, output)).await,
        User::Console(args) => Box::pin(console::run(connect()?, args, output)).await,
        User::Kill(args) => kill::run(connect()?, args, output).await,
        User::Cp(args) => cp::run(connect()?, args, output).await,
        User::Start(args) => start::run(connect()?, args, output).await,
        User::Stop(args) => stop::run(connect()?, args, output).await,
        User::Rename(args) => rename::run(connect()?, args, output).await,
        User::Resize(args) => resize::run(connect()?, args, output).await,
        User::Set(args) => set::run(connect()?, args, output).await,
        User::Pause(args) => pause::run(connect()?, args, output).await,
        User::Resume(args) => resume::run(connect()?, args, output).await,
        User::WakeOn(args) => wake_on::run(connect()?, args, output).await,
        User::Egress(args) => egress::run(connect()?, args, output).await,
        User::Lifetime(args) => lifetime::run(connect()?, args, output).await,
        User::Top(args) => top::run(connect()?, args, output).await,
        User::Rm(args) => rm::run(connect()?, args, output).await,
        User::Expose(args) => expose::run(connect()?, args, output).await,
        User::Hide(args) => hide::run(connect()?, args, output).await,
        User::Link(args) => link::run(connect()?, args, output).await,
        User::Revoke(args) => revoke::run(connect()?, args, output).await,
        User::Url(args) => url::run(connect()?, args, output).await,
        User::PortForward(args) => Box::pin(port_forward::run(connect()?, args, output)).await,
        User::Port(verb) => port::run(connect()?, verb, output).await,
        User::Ingress(verb) => Box::pin(ingress::run(connect()?, verb, output)).await,
        User::Snapshot(snapshot::Snapshot::Ls(listing)) => {
            snapshot::ls(connect()?, listing, output).await
        }
        User::Ssh(args) => ssh::run(connect()?, args, output).await,
        User::SshKey(verb) => ssh_key::run(connect()?, verb, output).await,
        User::SshConfig(args) => ssh_config::run(connect()?, args, output).await,
        User::Explain(args) => explain::run(connect()?, args, output).await,
        User::Prune(args) => prune::run(connect()?, args, output).await,
        User::Compare(args) => compare::run(connect()?, args, output).await,
        User::Watch(args) => watch::run(connect()?, args, output).await,
        User::Events(args) => events::run(connect()?, args, output).await,
        User::Use(args) => current::run(connect()?, args, output).await,
        User::Login(args) => login::run(connection, args, output).await,
        User::Context(verb) => context::run(connection, verb, output),
        User::Doctor => Box::pin(doctor::run(connection, output)).await,
        User::Version => version::run(connect(), output).await,
        User::Completion(args) => completion::run(definition(), args, output),
        User::Complete(args) => complete::run(definition(), connection, args, output).await,
        User::Man(args) => man::run(definition(), args, output),
    }
}

async fn operator(verb: Operator, controller: Controller, output: Output) -> Result<u8, Failure> {
    match verb {
        Operator::Nodes(args) => nodes::run(controller, args, output).await,
        Operator::Fsck => fsck::run(controller, output).await,
        Operator::Gc(args) => gc::run(controller, args, output).await,
        Operator::Recover(args) => recover::run(controller, args, output).await,
        Operator::Adopt(args) => adopt::run(controller, args, output).await,
        Operator::Release(args) => release::run(controller, args, output).await,
        Operator::Cordon(args) => cordon::run(controller, args, output).await,
        Operator::Uncordon(args) => uncordon::run(controller, args, output).await,
        Operator::Drain(args) => drain::run(controller, args, output).await,
        Operator::Node(verb) => node::run(controller, verb, output).await,
        Operator::Admin(verb) => admin::run(controller, verb, output).await,
        Operator::Token(verb) => token::run(controller, verb, output).await,
        Operator::Team(verb) => Box::pin(team::run(controller, verb, output)).await,
        Operator::Audit(verb) => audit::run(controller, verb, output).await,
    }
}

/// Replaces the exit code of our own failure, which must not look like the command's.
fn own(failure: Failure) -> Failure {
    match failure.exit {
        exit::PIPE => failure,
        _ => failure.exit(exit::EXEC),
    }
}

/// Parses the arguments of a verb.
#[cfg(test)]
fn parse<T: clap::Args>(line: &str) -> Result<T, clap::Error> {
    let verb = T::augment_args(Command::default().no_binary_name(true));
    T::from_arg_matches(&verb.try_get_matches_from(line.split_whitespace())?)
}
