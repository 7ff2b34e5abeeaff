//! Stand-in for `cloudflared` 2026.8.2, for machines without it: the commands that are used here, with the exit codes,
//! texts, answers and signals that were recorded of the real one. It connects to nothing.

use std::{
    collections::HashMap,
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    os::unix::net::UnixDatagram,
    process::ExitCode,
};

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let (options, plain) = split(&words);
    let config = options.get("config").map(String::as_str);
    let plain: Vec<_> = plain.iter().map(String::as_str).collect();
    let done = match plain.as_slice() {
        [] if words.iter().any(|word| word == "--version") => {
            println!("cloudflared version 2026.8.2 (built 2026-08-27-1015 UTC)");
            Ok(())
        }
        ["tunnel", "ingress", "validate"] => validate(config),
        ["tunnel", "run"] => run(config, options.get("credentials-file").map(String::as_str)),
        _ => Err(format!("Incorrect Usage: {plain:?}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            eprintln!("{why}");
            ExitCode::FAILURE
        }
    }
}

/// Separates options with a value from the other words.
fn split(words: &[String]) -> (HashMap<String, String>, Vec<String>) {
    let (mut options, mut plain, mut words) = (HashMap::new(), Vec::new(), words.iter());
    while let Some(word) = words.next() {
        match word.strip_prefix("--") {
            Some(name @ ("config" | "credentials-file")) => {
                options.insert(name.to_owned(), words.next().cloned().unwrap_or_default());
            }
            Some(_) => {}
            None => plain.push(word.clone()),
        }
    }
    (options, plain)
}

fn read(config: Option<&str>) -> Result<String, String> {
    let path = config.ok_or("Cannot determine default configuration path")?;
    fs::read_to_string(path)
        .map_err(|error| format!("error parsing YAML in config file at {path}: {error}"))
}

/// A rule: host name and service.
type Rule = (Option<String>, String);

fn rules(text: &str) -> Vec<Rule> {
    let mut rules: Vec<Rule> = Vec::new();
    let lines = text.lines().skip_while(|line| *line != "ingress:").skip(1);
    for line in lines.take_while(|line| line.starts_with(' ')) {
        let line = match line.strip_prefix("  - ") {
            Some(first) => {
                rules.push((None, String::new()));
                first
            }
            // Deeper lines are options of the rule's origin.
            None => match line.strip_prefix("    ").filter(|line| !line.starts_with(' ')) {
                Some(line) => line,
                None => continue,
            },
        };
        let (Some((key, value)), Some(rule)) = (line.split_once(": "), rules.last_mut()) else {
            continue;
        };
        let value = value.trim_matches('"').to_owned();
        match key {
            "hostname" => rule.0 = Some(value),
            "service" => rule.1 = value,
            _ => {}
        }
    }
    rules
}

fn validate(config: Option<&str>) -> Result<(), String> {
    let text = read(config)?;
    let failed = |why: &str| Err(format!("Validation failed: {why}"));
    let rules = rules(&text);
    let Some((last, others)) = rules.split_last() else {
        return failed("No ingress rules were defined in the config file");
    };
    if last.0.is_some() {
        return failed(
            "The last ingress rule must match all URLs (i.e. it should not have a hostname or path filter)",
        );
    }
    for (host, _) in others {
        match host {
            None => {
                return failed(
                    "Rule #1 is matching the hostname '', but this will match every hostname",
                );
            }
            Some(host) if host[1..].contains('*') => {
                return failed(
                    "Hostname patterns can have at most one wildcard character (\"*\") and it can only be \
                               used for subdomains, e.g. \"*.example.com\"",
                );
            }
            Some(_) => {}
        }
    }
    let schemes = ["http://", "https://", "unix:", "http_status:", "tcp://", "hello_world"];
    if let Some((_, service)) =
        rules.iter().find(|(_, service)| !schemes.iter().any(|scheme| service.starts_with(scheme)))
    {
        return failed(&format!(
            "{service} is an invalid address, please make sure it has a scheme and a hostname"
        ));
    }
    println!("Validating rules from {}\nOK", config.unwrap_or_default());
    Ok(())
}

/// Answers on the metrics address until SIGTERM. SIGHUP ends it, as it ends the real one. The file `edge` beside the
/// configuration has the number of connections to Cloudflare, if it is not 4.
fn run(config: Option<&str>, credentials: Option<&str>) -> Result<(), String> {
    let text = read(config)?;
    let setting = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.map(|value| value.trim_matches('"').to_owned())
    };
    let path = credentials.ok_or("tunnel credentials file not found")?;
    let secret = fs::read_to_string(path);
    let secret = secret
        .map_err(|_| format!("Tunnel credentials file '{path}' doesn't exist or is not a file"))?;
    let tunnel = setting("tunnel")
        .ok_or("\"cloudflared tunnel run\" requires the ID or name of the tunnel")?;
    // A wrong secret leaves the real one running without a connection.
    let is_known = secret.contains(&tunnel);
    let metrics = setting("metrics").ok_or("no metrics address")?;
    let listener = TcpListener::bind(&metrics)
        .map_err(|error| format!("Error opening metrics server listener: {error}"))?;
    let edge = std::path::Path::new(config.unwrap_or_default()).with_file_name("edge");
    if is_known {
        tell_systemd();
    }
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut request = [0; 2048];
        let length = stream.read(&mut request).unwrap_or(0);
        let is_ready = String::from_utf8_lossy(&request[..length]).starts_with("GET /ready ");
        let told = fs::read_to_string(&edge).ok().and_then(|text| text.trim().parse::<u32>().ok());
        let connections = if is_known { told.unwrap_or(4) } else { 0 };
        let status = if connections > 0 { 200 } else { 503 };
        let body = format!(
            "{{\"status\":{status},\"readyConnections\":{connections},\"connectorId\":\"0c7a3f6b-0000-4000-8000-{:012}\"}}",
            std::process::id()
        );
        let status = if is_ready { status } else { 404 };
        let head = format!(
            "HTTP/1.1 {status} X\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(format!("{head}{body}").as_bytes()).ok();
    }
    Ok(())
}

/// Says that the first connection is there, where systemd waits for that. As with the real one, nothing else depends
/// on it.
fn tell_systemd() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = UnixDatagram::unbound().and_then(|own| own.send_to(b"READY=1", socket));
    if let Err(error) = told {
        eprintln!("failed to notify systemd: {error}");
    }
}
