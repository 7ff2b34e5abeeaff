//! Top of the command line: what every verb takes. The verbs are in `cmd`, each with its arguments. The
//! help texts are also the man pages.

use clap::{Command, CommandFactory, Parser, Subcommand};

use crate::{
    cmd::{User, Verb},
    output::Form,
    settings::Connection,
};

/// Sandboxes on a Proxmox VE cluster: start them, run commands in them, open their ports.
#[derive(Debug, Parser)]
#[command(
    name = "sandboxctl",
    version,
    max_term_width = WIDTH,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = EXAMPLES,
    after_long_help = EXAMPLES_AND_CODES
)]
pub struct Args {
    /// Flags that find the controller.
    #[command(flatten)]
    pub(crate) connection: Connection,
    /// Print JSON: one object, or a list; ids are under `id`. Errors are JSON on stderr
    #[arg(long, global = true, help_heading = "Output")]
    pub(crate) json: bool,
    /// Form of the output [default: a table that fits the terminal]
    #[arg(short, long, global = true, value_name = "FORM", help_heading = "Output")]
    pub(crate) output: Option<Form>,
    /// The verb.
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Columns of a help text, also on a wider terminal. Texts that clap does not wrap are written for it.
const WIDTH: usize = 80;

const EXAMPLES: &str = "\
Examples:
  sandboxctl login              which controller, as whom; once
  sandboxctl run --rm -it       a shell in a new sandbox, gone at its end
  id=$(sandboxctl create)       a sandbox; its id on stdout
  sandboxctl exec $id uname -a  run a command in it
  sandboxctl shell $id          a shell on a terminal
  sandboxctl cp ./src $id:/srv  copy files, both ways
  sandboxctl expose $id 8080    open a port; prints the address
  sandboxctl pause $id          freeze it; a request or an exec wakes it
  sandboxctl ls                 what there is
  sandboxctl explain $id        why it is on that node
  sandboxctl rm $id             delete it, for good";

const EXAMPLES_AND_CODES: &str = "\
Examples:
  sandboxctl login              which controller, as whom; once
  sandboxctl run --rm -it       a shell in a new sandbox, gone at its end
  id=$(sandboxctl create)       a sandbox; its id on stdout
  sandboxctl exec $id uname -a  run a command in it
  sandboxctl shell $id          a shell on a terminal
  sandboxctl cp ./src $id:/srv  copy files, both ways
  sandboxctl expose $id 8080    open a port; prints the address
  sandboxctl pause $id          freeze it; a request or an exec wakes it
  sandboxctl ls                 what there is
  sandboxctl explain $id        why it is on that node
  sandboxctl rm $id             delete it, for good

Sandboxes are named by their name, an id, a part of it from either end, a vmid,
@current or @last.

Configuration, the first that is there wins:
  flag             --endpoint, --token, --token-file, --client-cert, --ca
  context by flag  --context NAME
  environment      SANDBOXCTL_ENDPOINT, SANDBOXCTL_TOKEN, SANDBOXCTL_TOKEN_FILE,
                   SANDBOXCTL_CLIENT_CERT, SANDBOXCTL_CA
  context          SANDBOXCTL_CONTEXT, or that of `sandboxctl login` and
                   `context use`
  file             ~/.config/sandboxctl/config.toml: endpoint, token,
                   token_file, client_cert, ca

Exit codes:
  0    done
  1    refused, failed, or fsck found something
  2    wrong usage or configuration
  3    no such sandbox, command, file, snapshot, service or node
  4    not now: no room, or something does not answer; the same call may work
       later
  125  exec, run, shell, attach, logs -f: the command could not be run, or its
       outcome was lost (every other code of these is the command's own)
  130  interrupted
  141  whoever read our output went away
  143  ended by SIGTERM

Pages that messages name docs/... are in /usr/share/doc/sandboxctl.";

/// Builds the command line for its help, in which the verbs of users and of operators stand apart:
/// clap has one list of verbs, which becomes the operators'; the users' is written above it.
pub fn for_help() -> Command {
    let users = Command::default().max_term_width(WIDTH).disable_help_flag(true);
    let mut users = User::augment_subcommands(users).help_template("{all-args}");
    let listed = users.render_help().ansi().to_string();
    let mut all = Args::command()
        .subcommand_help_heading("Commands for operators")
        .help_template(format!(
            "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{}\n\n{{all-args}}{{after-help}}",
            listed.trim_end()
        ));
    // The verb `help` is there once it is built.
    all.build();
    for verb in users.get_subcommands() {
        if let Some(verb) = all.find_subcommand_mut(verb.get_name()) {
            *verb = std::mem::take(verb).hide(true);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clap_accepts_the_definition() {
        Args::command().debug_assert();
    }

    #[test]
    fn change_of_a_size_or_of_limits_names_one_at_least() {
        for (verb, flag) in [("resize web", "--cpus 2"), ("team set acme", "--cores 2")] {
            let parse = |line: &str| Args::try_parse_from(line.split(' '));
            let error = parse(&format!("sandboxctl {verb}")).expect_err("nothing to change");
            assert_eq!(error.kind(), clap::error::ErrorKind::MissingRequiredArgument, "{verb}");
            parse(&format!("sandboxctl {verb} {flag}")).expect("one is enough");
        }
    }
}
