//! The sandboxes that a verb names, as arguments: one text says in which ways. `named` resolves them.

use clap::Args;

/// One sandbox.
#[derive(Debug, Args)]
pub(crate) struct One {
    /// Sandbox: its name, its id or a part of it from either end, a vmid, @current or @last
    pub(crate) id: String,
}

/// One sandbox or several.
#[derive(Debug, Args)]
pub(crate) struct Many {
    /// Sandboxes: each a name, an id or a part of it from either end, a vmid, @current or @last
    #[arg(required = true, value_name = "ID")]
    pub(crate) ids: Vec<String>,
}

#[cfg(test)]
mod tests {
    use clap::{Command, CommandFactory as _};

    /// Returns the verbs from this one down that take sandboxes, with the text that says which.
    fn texts(verb: &Command) -> Vec<(String, String)> {
        let takes =
            verb.get_positionals().filter(|arg| ["id", "ids"].contains(&arg.get_id().as_str()));
        let help = takes.filter_map(|arg| arg.get_help()).map(ToString::to_string);
        let mut found: Vec<_> = help.map(|help| (verb.get_name().to_owned(), help)).collect();
        found.extend(verb.get_subcommands().flat_map(texts));
        found
    }

    #[test]
    fn every_verb_says_in_which_ways_a_sandbox_is_named() {
        let found = texts(&crate::args::Args::command());
        assert!(found.len() > 30, "verbs are missing: {found:?}");
        for (verb, help) in found {
            let ways = ["id or a part of it from either end", "a vmid", "@last"];
            assert!(ways.iter().all(|way| help.contains(way)), "{verb}: {help}");
            // A name is unique in a team, and an operator releases sandboxes of every team.
            assert_eq!(help.contains("name"), verb != "release", "{verb}: {help}");
            // `use` sets what @current is.
            assert_eq!(help.contains("@current"), verb != "use", "{verb}: {help}");
        }
    }
}
