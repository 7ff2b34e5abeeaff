//! `resize`: gives a sandbox other cores, memory or disk.

use clap::Args;
use proto::{
    sandbox::v1::{Progress, Sandbox, Size},
    update,
};

use super::targets::One;
use crate::{
    client::{Controller, patient, promised},
    failure::Failure,
    output::{Output, json},
    sizes,
};

/// Arguments of `resize`.
#[derive(Debug, Args)]
#[command(override_usage = "sandboxctl resize <OPTIONS> <ID>")]
#[command(after_help = "\
Examples:
  sandboxctl resize @last --memory 4g        more memory, at once, while it runs
  sandboxctl resize web --cpus 2 --disk 40g  two cores; the disk grows to 40 GiB

The sandbox runs or is stopped. More memory must fit on its node; less than what
it uses is refused. A disk never shrinks.")]
pub(crate) struct Resize {
    /// Sandbox.
    #[command(flatten)]
    pub(super) sandbox: One,
    /// Parts of the size, one at least.
    #[command(flatten)]
    size: Parts,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct Parts {
    /// CPU cores
    #[arg(long, value_name = "CORES", value_parser = sizes::cores)]
    cpus: Option<u32>,
    /// Memory, such as 2g; a bare number is MiB
    #[arg(long, value_name = "SIZE", value_parser = sizes::memory)]
    memory: Option<u32>,
    /// Disk, such as 40g; a bare number is GiB
    #[arg(long, value_name = "SIZE", value_parser = sizes::disk)]
    disk: Option<u32>,
}

pub(super) async fn run(
    controller: Controller,
    Resize { sandbox: One { id }, size }: Resize,
    output: Output,
) -> Result<u8, Failure> {
    let Parts { cpus, memory, disk } = size;
    let asked = [("size.cpu_cores", cpus), ("size.memory_mib", memory), ("size.disk_gib", disk)];
    let fields: Vec<_> =
        asked.iter().filter(|(_, value)| value.is_some()).map(|(field, _)| *field).collect();
    let [cpu_cores, memory_mib, disk_gib] = asked.map(|(_, value)| value.unwrap_or_default());
    let size = Some(Size { cpu_cores, memory_mib, disk_gib });
    let request = update::request(Sandbox { id, size, ..Sandbox::default() }, &fields);
    let call = || {
        let (mut client, request) = (controller.sandboxes.clone(), request.clone());
        async move { client.update_sandbox(request).await }
    };
    let sandbox = promised(patient(call).await?.sandbox)?;
    if output.json {
        output.value(&json::sandbox(&sandbox))?;
        return Ok(0);
    }
    let Size { cpu_cores, memory_mib, disk_gib } = sandbox.size.unwrap_or_default();
    let disk = if disk_gib == 0 { String::new() } else { format!(", {disk_gib} GiB disk") };
    let under_way = sandbox.progress() == Progress::Resize;
    let next =
        if under_way { "; it is still being changed: `sandboxctl get` shows it" } else { "" };
    output.line(format!("{} has {cpu_cores} cores, {memory_mib} MiB{disk}{next}", sandbox.id))?;
    Ok(0)
}
