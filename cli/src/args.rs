//! Definition of the command line. The help texts here are also the man pages.

mod adopt;
mod clean;
mod labels;
mod lifecycle;
mod lifetime;
mod node;
mod values;

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args as Group, Parser, Subcommand};

pub use adopt::{Adopt, Release};
pub use clean::{Compare, Gc, Prune, Recover};
pub use labels::Labels;
pub use lifecycle::{Many, One, Pause, Resume};
pub use lifetime::Lifetime;
pub use node::{Cordon, Drain, Node, Uncordon};
pub use values::{Pair, Place, Service, SignalNumber};
use values::{duration, switch};

/// Sandboxes on a Proxmox VE cluster: start them, run commands in them, open their ports.
#[derive(Debug, Parser)]
#[command(
    name = "sandboxctl",
    version,
    max_term_width = 100,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = EXAMPLES_AND_CODES
)]
pub struct Args {
    /// What every verb takes.
    #[command(flatten)]
    pub global: Global,
    /// The verb.
    #[command(subcommand)]
    pub verb: Verb,
}

const EXAMPLES: &str = "\
Examples:
  id=$(sandboxctl create)                       a sandbox; its id on stdout
  sandboxctl exec $id -- uname -a               run a command in it
  sandboxctl exec -it $id -- bash               a shell on a terminal
  sandboxctl cp ./src $id:/srv                  copy files, both ways
  sandboxctl expose $id 8080                    open a port; prints the address
  sandboxctl pause $id                          freeze it; a request or an exec wakes it
  sandboxctl ls                                 what there is
  sandboxctl explain $id                        why it is on that node
  sandboxctl rm $id                             delete it, for good";

const EXAMPLES_AND_CODES: &str = "\
Examples:
  id=$(sandboxctl create)                       a sandbox; its id on stdout
  sandboxctl exec $id -- uname -a               run a command in it
  sandboxctl exec -it $id -- bash               a shell on a terminal
  sandboxctl cp ./src $id:/srv                  copy files, both ways
  sandboxctl expose $id 8080                    open a port; prints the address
  sandboxctl pause $id                          freeze it; a request or an exec wakes it
  sandboxctl ls                                 what there is
  sandboxctl explain $id                        why it is on that node
  sandboxctl rm $id                             delete it, for good

Configuration, the first that is there wins:
  flag                  --endpoint, --token, --token-file, --ca
  environment           SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN, SANDBOXCTL_TOKEN_FILE, SANDBOXCTL_CA
  file                  ~/.config/sandboxctl/config.toml: endpoint, token, token_file, ca

Exit codes:
  0    done
  1    refused, failed, or fsck found something
  2    wrong usage or configuration
  3    no such sandbox, command, file, snapshot, service or node
  4    not now: no room, or something does not answer; the same call may work later
  125  exec, logs -f: the command could not be run, or its outcome was lost
       (every other code of these two is the command's own)
  130  interrupted
  141  whoever read our output went away";

/// What every verb takes.
#[derive(Debug, Clone, Default, Group)]
pub struct Global {
    /// Where the controller listens, such as https://controller:7443
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_ENDPOINT",
        hide_env_values = true,
        value_name = "URL",
        help_heading = "Connection"
    )]
    pub endpoint: Option<String>,
    /// Bearer token. Others on this machine can read arguments: prefer the environment or a file
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_TOKEN",
        hide_env_values = true,
        value_name = "TOKEN",
        help_heading = "Connection"
    )]
    pub token: Option<String>,
    /// File that holds the bearer token
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_TOKEN_FILE",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub token_file: Option<PathBuf>,
    /// CA of the controller's certificate, PEM
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CA",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub ca: Option<PathBuf>,
    /// Configuration file [default: ~/.config/sandboxctl/config.toml]
    #[arg(
        long,
        global = true,
        env = "SANDBOXCTL_CONFIG",
        hide_env_values = true,
        value_name = "FILE",
        help_heading = "Connection"
    )]
    pub config: Option<PathBuf>,
    /// Print JSON: one object, or a list; ids are under `id`. Errors are JSON on stderr
    #[arg(long, global = true)]
    pub json: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Create a sandbox and wait until it answers
    Create(Create),
    /// List sandboxes
    #[command(visible_alias = "list")]
    Ls(Ls),
    /// Show one sandbox
    Get(One),
    /// Run a command in a sandbox
    Exec(Exec),
    /// List the commands that a sandbox runs and ran
    Ps(One),
    /// Print what a command has said
    Logs(Logs),
    /// Signal a command and all that it started
    Kill(Kill),
    /// Copy files and directories into a sandbox or out of it
    Cp(Cp),
    /// Boot stopped sandboxes
    Start(Many),
    /// Stop sandboxes; their disks are kept
    Stop(Many),
    /// Freeze running sandboxes: their memory is kept, nothing in them runs
    Pause(Pause),
    /// Thaw paused sandboxes
    Resume(Resume),
    /// Say what wakes a sandbox when it is paused, or show it
    WakeOn(WakeOn),
    /// Say how long a sandbox lives, or show it
    Lifetime(SetLifetime),
    /// Show what sandboxes use, each second
    Top(Top),
    /// Delete sandboxes, for good
    #[command(visible_alias = "delete")]
    Rm(Many),
    /// Open a port of a sandbox to HTTP and print its address
    Expose(Expose),
    /// Close a port again, at once
    Hide(Hide),
    /// Print the address of an open port, or of all of them
    Url(Url),
    /// Snapshots that sandboxes are created from
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// List the nodes and their load
    Nodes,
    /// Say why a sandbox is where it is, or where one would go now
    Explain(Explain),
    /// Check that nothing is lost, leaked or doubled; exit 1 if something is
    Fsck,
    /// Let the nodes clean up now, or tell what they would do and why
    Gc(Gc),
    /// Delete sandboxes that have been stopped for long
    Prune(Prune),
    /// Compare a list of ids with what there is, both ways; exit 1 if they differ
    Compare(Compare),
    /// Take a container back that carries our mark and that its node does not know any more
    Recover(Recover),
    /// Make a sandbox of a container that was made without us
    Adopt(Adopt),
    /// End a sandbox and leave its container: an adopted one, or one whose container is not its own
    Release(Release),
    /// Give a node no new sandboxes
    Cordon(Cordon),
    /// Give a node new sandboxes again
    Uncordon(Uncordon),
    /// Let a node become empty, and show what is there still
    Drain(Drain),
    /// What is done to a node as a whole
    #[command(subcommand)]
    Node(Node),
    /// Print every change of a sandbox until it is gone
    Watch(One),
    /// Print what happened: who asked for what, and what the system did by itself
    Events(Events),
    /// Print the versions of this program and of the controller
    Version,
    /// Print a completion script for a shell
    #[command(
        after_help = "Examples:\n  sandboxctl completion bash > /etc/bash_completion.d/sandboxctl\n  source <(sandboxctl completion zsh)"
    )]
    Completion {
        /// Shell
        shell: clap_complete::Shell,
    },
    /// Write the man pages to a folder, or the main one to stdout
    Man {
        /// Folder; created if it is not there
        dir: Option<PathBuf>,
    },
}

/// `wake-on`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl wake-on ID                         show what wakes it
  sandboxctl wake-on ID --http off              requests get 503 while it is paused
  sandboxctl wake-on ID --http on --exec on     as a new sandbox has it

What is not named stays as it is.")]
pub struct WakeOn {
    /// `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    pub id: String,
    /// A request for one of its open ports
    #[arg(long, value_name = "on|off", value_parser = switch)]
    pub http: Option<bool>,
    /// A command, or access to its files
    #[arg(long, value_name = "on|off", value_parser = switch)]
    pub exec: Option<bool>,
    /// A connection to its SSH port
    #[arg(long, value_name = "on|off", value_parser = switch)]
    pub ssh: Option<bool>,
}

/// `lifetime`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl lifetime ID                        show when it expires
  sandboxctl lifetime ID --ttl 2h               two hours from now on
  sandboxctl lifetime ID --ttl never --idle 30m --idle-action pause

What is not named stays as it is. A node keeps to these rules whether or not the controller is there.
What was paused or stopped by its ttl gets as much time again when it is resumed or started.")]
pub struct SetLifetime {
    /// `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    pub id: String,
    /// The rules.
    #[command(flatten)]
    pub lifetime: Lifetime,
}

/// `top`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl top                                all that run or are paused, until Ctrl-C
  sandboxctl top --once ID                      one reading, taken over one second
  sandboxctl top --json                         the same as one list")]
pub struct Top {
    /// Sandboxes [default: all of the team that run or are paused]
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// Print one reading and end
    #[arg(long)]
    pub once: bool,
}

/// What to create.
#[derive(Debug, Default, PartialEq, Eq, Group)]
pub struct Wanted {
    /// Snapshot to create from; may be left out where there is only one
    #[arg(long, value_name = "ID")]
    pub snapshot: Option<String>,
    /// Cores [default: as the snapshot says]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pub cpus: u32,
    /// Memory in MiB [default: as the snapshot says]
    #[arg(long, value_name = "MiB", default_value_t = 0, hide_default_value = true)]
    pub memory: u32,
    /// Root disk in GiB, at least so large [default: as the snapshot says]
    #[arg(long, value_name = "GiB", default_value_t = 0, hide_default_value = true)]
    pub disk: u32,
    /// Size by its name in the controller's configuration; --cpus, --memory and --disk win
    #[arg(long, value_name = "NAME", default_value = "", hide_default_value = true)]
    pub size: String,
    /// Variable for every command that is run in it; may be given often
    #[arg(long, value_name = "K=V")]
    pub env: Vec<Pair>,
    /// Key and value of your own to find it by; may be given often
    #[arg(long, value_name = "K=V")]
    pub meta: Vec<Pair>,
    /// Port to open as soon as it runs: NAME=PORT, or PORT; may be given often
    #[arg(long, value_name = "NAME=PORT")]
    pub expose: Vec<Service>,
    /// Node that it must be on
    #[arg(long, value_name = "NODE")]
    pub node: Option<String>,
    /// What it asks of its node.
    #[command(flatten)]
    pub labels: Labels,
    /// Ask a DHCP server on the node's bridge for the address
    #[arg(long)]
    pub dhcp: bool,
    /// How long it lives.
    #[command(flatten)]
    pub lifetime: Lifetime,
}

/// `create`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl create --snapshot pvelxc_4vcpu_6gb_32gb_v1 --cpus 2 --memory 2048
  sandboxctl create --expose web=8080 --env RUST_LOG=debug --meta user=ada
  sandboxctl create --count 6
  sandboxctl create --ttl 8h --ttl-action delete --idle 30m
  sandboxctl create --request-id build-117      run it twice: still one sandbox")]
pub struct Create {
    /// What to create.
    #[command(flatten)]
    pub wanted: Wanted,
    /// Idempotency key: the same key and the same wishes are the same sandbox [default: random]
    #[arg(long, value_name = "KEY")]
    pub request_id: Option<String>,
    /// Print the id as soon as the creation is recorded
    #[arg(long)]
    pub no_wait: bool,
    /// How many, at once; with --request-id the keys are KEY-1, KEY-2 and so on
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// How long to wait for it to run before giving up watching
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = duration)]
    pub wait: Duration,
}

/// `ls`.
#[derive(Debug, Group)]
pub struct Ls {
    /// Also those that are deleted or whose creation failed
    #[arg(short, long)]
    pub all: bool,
    /// Print the ids only, one a line
    #[arg(short, long)]
    pub quiet: bool,
}

/// `exec`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl exec ID -- ls -l /
  sandboxctl exec ID --shell 'cd /srv && git status | head'
  sandboxctl exec -i ID -- tar x -C /srv < files.tar
  sandboxctl exec -it ID -- bash
  sandboxctl exec --timeout 30s --user 1000 --cwd /srv ID -- make
  sandboxctl exec --exec-id build-7 --timeout 2h ID -- make
                                       run it twice: still one run, from its first output
  sandboxctl exec --detach --timeout 2h ID -- make
                                       prints the exec id, for `ps`, `logs` and `kill`

When the connection breaks, it is attached to again for up to 60 s, and nothing comes twice. The
third Ctrl-C kills the command. If this program is killed, the command runs on until its timeout.

The exit code is the command's own: 128 + n when signal n ended it, 124 when its time was over,
125 when it could not be run or its outcome was lost.")]
pub struct Exec {
    /// Send our stdin to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Run it on a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Working directory [default: the user's home]
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Variable for the command; may be given often
    #[arg(long, value_name = "K=V")]
    pub env: Vec<Pair>,
    /// User by name or number [default: root]
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// Kill the command and all it started after this time, such as 30s or 2h [default: 5m]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub timeout: Option<Duration>,
    /// Name of the run: it runs once however often it is asked for [default: random]
    #[arg(long, value_name = "KEY")]
    pub exec_id: Option<String>,
    /// Start it, print its exec id, and leave it running
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    pub detach: bool,
    /// A line for `bash -c`, in place of CMD
    #[arg(long, value_name = "LINE", conflicts_with = "command")]
    pub shell: Option<String>,
    /// `pvelxc-...`, a vmid, `pve_lxc_{vmid}` or `cmux-{vmid}`
    pub id: String,
    /// Program and arguments, passed on as they are
    #[arg(last = true, required_unless_present = "shell", value_name = "CMD")]
    pub command: Vec<OsString>,
}

/// `logs`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl logs ID EXEC_ID           what it has said until now
  sandboxctl logs -f ID EXEC_ID        and what it goes on to say; its exit code is ours then

The last of the output is kept while the sandbox is up; `sandboxctl ps ID` lists the exec ids.")]
pub struct Logs {
    /// Go on until the command ends, and end with its exit code
    #[arg(short, long)]
    pub follow: bool,
    /// Sandbox
    pub id: String,
    /// Name of the run
    pub exec_id: String,
}

/// `kill`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl kill ID EXEC_ID           asks it to end
  sandboxctl kill -s KILL ID EXEC_ID   ends it")]
pub struct Kill {
    /// Signal by name or number
    #[arg(short, long, value_name = "SIGNAL", default_value = "TERM")]
    pub signal: SignalNumber,
    /// Sandbox
    pub id: String,
    /// Name of the run
    pub exec_id: String,
}

/// `cp`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl cp notes.txt ID:/root/            into a directory
  sandboxctl cp notes.txt ID:/root/todo.txt    under another name
  sandboxctl cp ./src ID:/srv                  /srv/src, or /srv where there is none yet
  sandboxctl cp ./src/. ID:/srv                what is in it, right into /srv
  sandboxctl cp ID:/var/log ./logs             out of it
  sandboxctl cp ID:/srv - | tar t              a tar archive on stdout
  tar c . | sandboxctl cp - ID:/srv            one from stdin

A path of this machine that looks like a sandbox's is written ./A:/b. Links are copied as links.")]
pub struct Cp {
    /// User in the sandbox by name or number [default: root]
    #[arg(long, value_name = "USER")]
    pub user: Option<String>,
    /// From where: a path, ID:/path, or - for a tar archive on stdin
    #[arg(value_name = "SRC")]
    pub source: Place,
    /// To where: a path, ID:/path, or - for a tar archive on stdout
    #[arg(value_name = "DST")]
    pub destination: Place,
}

/// `expose`.
#[derive(Debug, Group)]
pub struct Expose {
    /// Sandbox
    pub id: String,
    /// TCP port inside it
    #[arg(value_parser = clap::value_parser!(u32).range(1..=65535))]
    pub port: u32,
    /// Name of the service [default: port-PORT]
    #[arg(long)]
    pub name: Option<String>,
}

/// `hide`.
#[derive(Debug, Group)]
pub struct Hide {
    /// Sandbox
    pub id: String,
    /// Name of the service, or its port
    pub name: String,
}

/// `url`.
#[derive(Debug, Group)]
pub struct Url {
    /// Sandbox
    pub id: String,
    /// Port or name [default: all that are open]
    #[arg(value_name = "PORT|NAME")]
    pub service: Option<String>,
}

/// `snapshot`.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// List the snapshots and the nodes that hold them
    #[command(visible_alias = "list")]
    Ls,
}

/// `explain`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl explain ID
  sandboxctl explain --dry-run --cpus 8")]
pub struct Explain {
    /// Sandbox whose recorded decision to show
    #[arg(required_unless_present = "dry_run", conflicts_with = "dry_run")]
    pub id: Option<String>,
    /// Decide now for a sandbox like this, and create nothing
    #[arg(long)]
    pub dry_run: bool,
    /// What would be created.
    #[command(flatten)]
    pub wanted: Wanted,
}

/// `events`.
#[derive(Debug, Group)]
#[command(after_help = "\
Examples:
  sandboxctl events                             the last 50 of the team
  sandboxctl events ID --since 0                all that is kept of one sandbox
  sandboxctl events -f --last 0 --json          what comes, one object a line
  sandboxctl events -f --since 4711             what came after that one, and what comes

With -f it goes on until Ctrl-C. When the connection breaks, it is taken up again for up to 60 s, and
no event comes twice or is left out.")]
pub struct Events {
    /// Sandbox [default: all of the team]; one that is long gone by its whole id
    #[arg(value_name = "ID")]
    pub id: Option<String>,
    /// Go on with what happens from now
    #[arg(short, long)]
    pub follow: bool,
    /// Begin after this revision; 0: with the oldest that is kept
    #[arg(long, value_name = "REVISION", conflicts_with = "last")]
    pub since: Option<u64>,
    /// Begin with the last N
    #[arg(long, value_name = "N", default_value_t = 50, value_parser = clap::value_parser!(u32).range(0..=10_000))]
    pub last: u32,
    /// Of all teams, and of the nodes; needs an operator's token
    #[arg(long)]
    pub all_teams: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[track_caller]
    fn parse(line: &str) -> Verb {
        Args::try_parse_from(line.split(' ')).expect(line).verb
    }

    #[track_caller]
    fn refused(line: &str) {
        assert!(Args::try_parse_from(line.split(' ')).is_err(), "{line}");
    }

    #[test]
    fn events_begin_at_one_place() {
        let Verb::Events(events) = parse("sandboxctl events") else { panic!("not events") };
        assert_eq!((events.last, events.since, events.follow), (50, None, false));
        let Verb::Events(events) = parse("sandboxctl events 100001 -f --since 0 --all-teams")
        else {
            panic!("not events")
        };
        assert_eq!((events.id.as_deref(), events.since), (Some("100001"), Some(0)));
        assert!(events.follow && events.all_teams);
        refused("sandboxctl events --since 5 --last 5");
        refused("sandboxctl events --last 10001");
    }

    #[test]
    fn exec_passes_its_command_on_as_it_is() {
        let Verb::Exec(exec) =
            parse("sandboxctl exec -it --timeout 2h 100001 -- ls --json -t -- x")
        else {
            panic!("not exec")
        };
        assert!(exec.interactive && exec.tty);
        assert_eq!(exec.timeout, Some(Duration::from_secs(7200)));
        assert_eq!(exec.command, ["ls", "--json", "-t", "--", "x"]);
        let Verb::Exec(exec) = parse("sandboxctl exec 100001 --shell true") else {
            panic!("not exec")
        };
        assert_eq!(exec.shell.as_deref(), Some("true"));
        refused("sandboxctl exec 100001");
        refused("sandboxctl exec 100001 --shell true -- ls");
        refused("sandboxctl exec 100001 ls");
    }

    #[test]
    fn create_takes_pairs_and_services() {
        let line =
            "sandboxctl create --env A=b=c --meta user=ada --expose web=8080 --expose 81 --dhcp";
        let Verb::Create(create) = parse(line) else { panic!("not create") };
        let wanted = create.wanted;
        assert_eq!(wanted.env, [Pair { key: "A".into(), value: "b=c".into() }]);
        assert_eq!(wanted.expose[0], Service { name: "web".into(), port: 8080 });
        assert_eq!(wanted.expose[1], Service { name: String::new(), port: 81 });
        assert_eq!((create.count, create.wait), (1, Duration::from_secs(300)));
        for wrong in ["--env A", "--env =b", "--expose web=0", "--expose x=y", "--expose 65536"] {
            refused(&format!("sandboxctl create {wrong}"));
        }
        refused("sandboxctl create --count 0");
        refused("sandboxctl create --wait 5d");
    }

    #[test]
    fn explain_wants_a_sandbox_or_a_dry_run() {
        parse("sandboxctl explain 100001");
        parse("sandboxctl explain --dry-run --snapshot s --cpus 2");
        refused("sandboxctl explain");
        refused("sandboxctl explain 100001 --dry-run");
    }

    #[test]
    fn a_copy_has_a_side_in_a_sandbox() {
        let line = "sandboxctl cp ./a:b pvelxc-x:/srv";
        let Verb::Cp(cp) = parse(line) else { panic!("not cp") };
        assert_eq!(cp.source, Place::Here("./a:b".into()));
        let path = "/srv".to_owned();
        assert_eq!(cp.destination, Place::Sandbox { id: "pvelxc-x".into(), path });
        assert_eq!("-".parse(), Ok(Place::Stream));
        refused("sandboxctl cp a 100001:srv");
        refused("sandboxctl cp a");
    }

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, number) in [("TERM", 15), ("sigkill", 9), ("1", 1)] {
            assert_eq!(text.parse(), Ok(SignalNumber(number)));
        }
        for wrong in ["0", "32", "X", ""] {
            assert!(wrong.parse::<SignalNumber>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn times_have_units() {
        assert_eq!(duration("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(duration("30"), Ok(Duration::from_secs(30)));
        for wrong in ["", "s", "0", "-1s", "1x", "99999999999999999h"] {
            assert!(duration(wrong).is_err(), "{wrong}");
        }
    }
}
