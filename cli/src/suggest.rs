//! Suggestions for a word that is no verb: none leads to what deletes or ends something, because
//! people repeat a suggestion without reading it.

use clap::error::{ContextKind, ContextValue};

/// Verbs and flags that are never suggested.
const DESTRUCTIVE: &[&str] = &[
    "rm", "delete", "prune", "release", "forget", "kill", "stop", "gc", "drain", "revoke", "--rm",
    "--force", "--lost", "--yes", "--none",
];

/// Words of other programs, and the verb that does the same here.
const SAME: &[(&str, &str)] = &[
    ("bash", "shell"),
    ("copy", "cp"),
    ("describe", "get"),
    ("enter", "shell"),
    ("forward", "port-forward"),
    ("freeze", "pause"),
    ("image", "snapshot"),
    ("images", "snapshot"),
    ("info", "get"),
    ("launch", "create"),
    ("log", "logs"),
    ("new", "create"),
    ("pull", "cp"),
    ("push", "cp"),
    ("scp", "cp"),
    ("select", "use"),
    ("sh", "shell"),
    ("show", "get"),
    ("snapshots", "snapshot"),
    ("stats", "top"),
    ("status", "get"),
    ("switch", "use"),
    ("template", "snapshot"),
    ("templates", "snapshot"),
    ("unpause", "resume"),
];

/// Takes what destroys out of the suggestions of a usage error, and adds what other programs call so.
pub(crate) fn careful(mut error: clap::Error) -> clap::Error {
    for kind in
        [ContextKind::SuggestedSubcommand, ContextKind::SuggestedArg, ContextKind::SuggestedValue]
    {
        let mut words: Vec<String> = match error.get(kind) {
            Some(ContextValue::String(word)) => vec![word.clone()],
            Some(ContextValue::Strings(words)) => words.clone(),
            _ => Vec::new(),
        };
        if kind == ContextKind::SuggestedSubcommand
            && let Some(ContextValue::String(typed)) = error.get(ContextKind::InvalidSubcommand)
            && let Some((_, verb)) = SAME.iter().find(|(word, _)| word == typed)
        {
            words = vec![(*verb).to_owned()];
        }
        words.retain(|word| !DESTRUCTIVE.contains(&word.as_str()));
        match words.as_slice() {
            [] => drop(error.remove(kind)),
            [only] => drop(error.insert(kind, ContextValue::String(only.clone()))),
            _ => drop(error.insert(kind, ContextValue::Strings(words))),
        }
    }
    error
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::Args;

    fn told(words: &[&str]) -> String {
        let line = std::iter::once("sandboxctl").chain(words.iter().copied());
        let error = Args::try_parse_from(line).expect_err("no verb");
        careful(error).to_string()
    }

    #[test]
    fn no_harmless_word_leads_to_a_destructive_verb() {
        for word in [
            "rum",
            "rn",
            "runn",
            "prune-list",
            "template",
            "templates",
            "image",
            "tag",
            "remote",
            "rename",
            "select",
            "deploy",
            "detach",
            "debug",
            "describe",
            "drop-in",
            "fork",
            "format",
            "forge",
            "forgot",
            "fetch",
            "skill",
            "kiln",
            "fill",
            "step",
            "shop",
            "stat",
            "spot",
            "top-up",
            "real",
            "relate",
            "releases",
            "replace",
            "rem",
            "ram",
            "rmi",
            "gs",
            "gcc",
            "train",
            "brain",
            "grain",
            "tune",
            "prone",
            "pruned",
            "delta",
            "elect",
            "pull",
        ] {
            for words in [&[word][..], &["node", word], &["admin", word]] {
                let told = told(words);
                for verb in DESTRUCTIVE {
                    assert!(!told.contains(&format!("'{verb}'")), "{words:?}: {told}");
                }
            }
        }
        let flag = told(&["run", "--r", "x"]);
        assert!(!flag.contains("'--rm'"), "{flag}");
        let value = told(&["create", "--ttl-action", "template"]);
        assert!(!value.contains("exists: 'delete'"), "{value}");
    }

    #[test]
    fn words_of_other_programs_lead_to_our_verbs() {
        for (word, verb) in SAME {
            let told = told(&[word]);
            assert!(told.contains(&format!("'{verb}'")), "{word}: {told}");
        }
        assert!(told(&["creat"]).contains("'create'"), "a typo");
    }
}
