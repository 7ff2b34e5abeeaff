//! Changes to a running container.

use std::process::Command;
use std::time::Duration;

use super::state;
use crate::conf::net::Net;
use crate::ctx::Ctx;
use crate::failure::{Result, ignore};
use crate::run::{PATH, run};

/// Sets the address, the gateway and the hardware address of a running container's interface to
/// those in its configuration.
pub(crate) fn change_net(ctx: &Ctx, vmid: u32, net: &Net) -> Result {
    let Some(pid) = state::init_pid(ctx, vmid)? else { return Ok(()) };
    let Some(name) = net.get("name") else { return Ok(()) };
    let ip = |args: &[&str]| {
        let mut command = Command::new("nsenter");
        command.env("PATH", PATH).args(["-t", &pid.to_string(), "-n", "ip"]).args(args);
        run(ctx, &mut command, Duration::from_secs(10))
    };
    if let Some(hwaddr) = net.get("hwaddr") {
        // Setting the same hardware address again would drop the routes for nothing.
        let now = ip(&["-o", "link", "show", "dev", name])?;
        if !now.to_ascii_uppercase().contains(&hwaddr.to_ascii_uppercase()) {
            ip(&["link", "set", name, "down"])?;
            ip(&["link", "set", name, "address", hwaddr])?;
            ip(&["link", "set", name, "up"])?;
        }
    }
    if let Some(address) = net.get("ip").filter(|a| a.contains('/')) {
        ip(&["-4", "addr", "flush", "dev", name])?;
        ip(&["addr", "add", address, "dev", name])?;
        if let Some(gateway) = net.get("gw") {
            ignore(ip(&["route", "replace", "default", "via", gateway, "dev", name]));
        }
    }
    Ok(())
}
