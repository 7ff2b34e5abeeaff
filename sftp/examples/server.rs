//! Serves SFTP on stdin and stdout, for the tests with OpenSSH's client: `sftp -D PATH`.

fn main() -> std::io::Result<()> {
    sftp::serve(std::io::stdin().lock(), std::io::stdout().lock())
}
