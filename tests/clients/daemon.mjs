// A daemon of the tests' own, as in daemon.py.
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { chmod, mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

export class Daemon {
  static async start() {
    const daemon = new Daemon();
    daemon.dir = await mkdtemp(join(tmpdir(), 'sop-clients-'));
    // As root, PostgreSQL runs as another user, who must find its folder in this one.
    await chmod(daemon.dir, 0o711);
    const args = ['serve', '--listen', '127.0.0.1:0', '--data-dir', daemon.dir];
    daemon.process = spawn(process.env.SOP ?? 'target/debug/sop', args, { stdio: ['ignore', 'pipe', 'pipe'] });
    daemon.ended = once(daemon.process, 'exit');
    let log = '';
    daemon.process.stderr.on('data', (text) => { log = (log + text).slice(-65_536); });
    const { value: line } = await createInterface({ input: daemon.process.stdout })[Symbol.asyncIterator]().next();
    if (!line?.startsWith('listening ')) {
      await daemon.stop();
      throw new Error(`the daemon did not start: ${log}`);
    }
    daemon.url = line.split(' ')[1];
    daemon.admin = JSON.parse(await readFile(join(daemon.dir, 'admin.json'), 'utf8'));
    await daemon.signIn();
    return daemon;
  }

  /** A token of the administrator's. */
  async signIn() {
    const body = new URLSearchParams({
      grant_type: 'client_credentials',
      client_id: this.admin.client_id,
      client_secret: this.admin.client_secret,
    });
    const answer = await fetch(`${this.url}/oauth2/token`, { method: 'POST', body });
    if (answer.status !== 200) throw new Error(await answer.text());
    this.token = (await answer.json()).access_token;
  }

  send(method, path, token = this.token) {
    return fetch(this.url + path, { method, headers: { authorization: `Bearer ${token}` } });
  }

  async stop() {
    this.process.kill('SIGTERM');
    await this.ended;
    await rm(this.dir, { recursive: true, force: true });
  }
}
