//! `url`: prints the addresses of open ports.

use super::hide::find;
use crate::{
    args::Url,
    client::{Controller, fetch},
    exit,
    failure::Failure,
    output::{Output, json},
};

pub(super) async fn run(controller: Controller, url: Url, output: Output) -> Result<u8, Failure> {
    let sandbox = fetch(&controller, url.id).await?;
    let Some(wanted) = url.service else {
        if output.json {
            output.value(&sandbox.services.iter().map(json::service).collect::<Vec<_>>())?;
        } else if sandbox.services.is_empty() {
            output.note(format!(
                "no port is open; `sandboxctl expose {} PORT` opens one",
                sandbox.id
            ));
        } else {
            sandbox.services.iter().try_for_each(|service| output.line(&service.url))?;
        }
        return Ok(0);
    };
    let service = find(&sandbox.services, &wanted).ok_or_else(|| {
        Failure::local(format!("{} has no open port or service {wanted}", sandbox.id))
            .hint(format!("open it with `sandboxctl expose {} PORT`", sandbox.id))
            .exit(exit::NOT_FOUND)
    })?;
    if output.json {
        output.value(&json::service(service))?;
    } else {
        output.line(&service.url)?;
    }
    Ok(0)
}
